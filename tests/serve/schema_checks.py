"""A check of schemathesis, in place of its own: what the description allows is answered, or refused for what it means.

Read by schemathesis itself (SCHEMATHESIS_HOOKS), in another process.
"""

import schemathesis

# What no JSON schema can say: how many tokens a text has, which tokens there are, what a grammar or a chat template takes.
OF_MEANING = ("context_length_exceeded", "unsupported_value")


@schemathesis.check
def what_is_allowed_is_answered(ctx, response, case):
    mode = case.meta.generation.mode if case.meta is not None else None
    if mode is None or not mode.is_positive or response.status_code != 400:
        return
    error = response.json()["error"]
    if "got `float`" in error["message"]:
        return  # 3.0 is an integer to JSON schema, and none here
    assert error["code"] in OF_MEANING, f"refused, though the description allows it: {error}"
