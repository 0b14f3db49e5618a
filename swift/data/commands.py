"""swift data inspect."""

from swift.config.commands import DataInspectConfig


def data_inspect(config: DataInspectConfig) -> None:
    """Show rows as the model sees them. Needs a tokenizer, not the weights."""
    from swift import hub
    from swift.data.encode import encode
    from swift.data.inspect import inspect
    from swift.data.load import load_records
    from swift.model.checkpoints import model_reference
    from swift.model.load import context_length
    from swift.model.template import read_system, read_template
    from swift.model.tokenizer import load_tokenizer

    loaded = load_records(
        config.dataset,
        want="sft" if config.rlhf_type is None else "preference",
        columns=config.columns,
        strict=config.strict,
        max_rejected=1.0,
        data_seed=config.data_seed,
        shuffle=False,
        model_name=config.model_name,
        model_author=config.model_author,
        system=read_system(config.system),
        use_hf=config.use_hf,
        hub_token=config.hub_token,
        offline=config.offline,
    )
    snapshot = hub.resolve(
        model_reference(config.model or ""), config.model_revision, use_hf=config.use_hf, token=config.hub_token, offline=config.offline
    )
    tokenizer = load_tokenizer(snapshot.path, chat_template=read_template(config.chat_template))
    encoded = encode(
        loaded.train,
        tokenizer,
        objective="sft" if config.rlhf_type is None else "preference",
        max_length=config.max_length or context_length(snapshot.path),
        truncation_strategy=config.truncation_strategy,
        use_chat_template=config.use_chat_template is not False,
        loss_scale=config.loss_scale or "default",
        enable_thinking=config.enable_thinking,
    )
    inspect(encoded, tokenizer, config.rows, rejected=loaded.rejected)
