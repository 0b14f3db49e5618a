"""A server of the tiny model for another package, and programs in processes of their own: how they begin, and that they end."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from swift.config.evaluate import EvalConfig
from swift.config.options import build
from swift.errors import ConfigError, DependencyError, MachineError
from swift.evaluate import EVALUATORS
from swift.evaluate.external.process import started, work
from swift.evaluate.external.server import at_url, serving, words_of
from swift.evaluate.subject import subjects


def make(**options):
    return build(EvalConfig, ("flag", {"eval_backend": "evalscope", "eval_dataset": ["general_qa"], **options}))


def is_gone(pid):
    """Whether a process has ended. One that nobody has asked about yet (a zombie) has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pids, timeout_s=20):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and not all(map(is_gone, pids)):
        time.sleep(0.05)
    return all(map(is_gone, pids))


def below(pid):
    """``pid`` and all processes that it and they have started."""
    children = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return [pid] + [each for child in children for each in below(child)]


def ask(served, key):
    body = {"model": served.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{served.url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_a_model_is_served_with_a_key_of_its_own_and_nothing_is_left(tiny_model, tmp_path):
    (subject,) = subjects(make(models=[str(tiny_model)]))
    with serving(subject, tmp_path / "log.txt") as served:
        pids = below(served.child.process.pid)
        assert ask(served, served.key)["usage"]["completion_tokens"] >= 1
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(served, "another-key")
        known = at_url(make(eval_url=served.url, eval_api_key=served.key))
        assert (known.model, known.child) == (tiny_model.name, None)
        with pytest.raises(ConfigError, match="status 401"):
            at_url(make(eval_url=served.url, eval_api_key="another-key"))
        whole = at_url(make(eval_url=f"{served.url}/chat/completions", eval_api_key=served.key, model="other"))
        assert (whole.url, whole.model) == (served.url, tiny_model.name)  # as without --eval_backend
    assert len(pids) >= 2
    assert wait_until_gone(pids)
    assert served.key not in (tmp_path / "log.txt").read_text()


def test_options_of_model_and_engine_reach_the_server_and_no_secret_does(tiny_model, tmp_path):
    (subject,) = subjects(make(models=[str(tiny_model)], kv_cache_gib="0.5", seed="7", hub_token="secret", temperature="0.5"))
    words = words_of(subject, "tiny", tmp_path / "key")
    assert words[:3] == ["deploy", "--model", str(tiny_model)]
    assert [words[words.index(name) + 1] for name in ("--kv_cache_gib", "--seed", "--port", "--api_key")] == [
        "0.5",
        "7",
        "0",
        f"@{tmp_path / 'key'}",
    ]
    assert "secret" not in words
    assert "--temperature" not in words  # a request says it


def test_a_server_that_cannot_start_is_said_in_its_own_words(tiny_model, tmp_path):
    (subject,) = subjects(make(models=[str(tiny_model)], chat_template="no-such-template"))
    with pytest.raises(MachineError, match="no-such-template") as found, serving(subject, tmp_path / "log.txt"):
        pass
    assert "swift deploy ended with code 2" in found.value.message


def test_a_server_that_dies_ends_the_package_that_asks_it(tmp_path):
    # `run` of this package waits for ever: only the end of the server can end it.
    with started("swift deploy", ["cli", "--version"], tmp_path / "server.txt") as server:
        server.process.wait(60)
        began = time.monotonic()
        with pytest.raises(MachineError, match="swift deploy ended with code"):
            work("waits", "run", {}, make(models=["x"]), server=server, programs=waiting(tmp_path))
        assert time.monotonic() - began < 20


def waiting(folder):
    """A folder of programs, of which one waits in a process that it has started, and says which."""
    program = "import subprocess, sys, pathlib\n"
    program += "def run(job):\n    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    program += f"    pathlib.Path({str(folder / 'pid')!r}).write_text(str(child.pid))\n    child.wait()\n"
    program += "def check(job):\n    import no_such_package\n"
    program += "def fail(job):\n    raise ValueError('first line\\nsecond line')\n"
    program += "def ask(job):\n    raise ModuleNotFoundError('pip install this-and-that')\n"
    program += "def die(job):\n    import os; os._exit(9)\n"
    (folder / "waits.py").write_text(program)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_run_that_is_ended(tmp_path, number):
    lines = "from swift.config.evaluate import EvalConfig; from swift.evaluate.external.process import work; from pathlib import Path\n"
    lines += f"work('waits', 'run', {{}}, EvalConfig(), programs=Path({str(waiting(tmp_path))!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    process = subprocess.Popen(
        [sys.executable, "-c", lines],
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a test run in the background ignores it
    )
    end = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    pids = below(process.pid)
    assert int((tmp_path / "pid").read_text()) in pids and len(pids) == 3
    process.send_signal(number)
    try:
        process.wait(30)
    finally:
        process.kill()
        process.wait()
    assert wait_until_gone(pids)


def test_what_a_program_needs_and_what_it_refuses_is_one_line(tmp_path):
    config = make(models=["x"])
    with pytest.raises(DependencyError, match="needs the package no_such_package"):
        work("waits", "check", {}, config, programs=waiting(tmp_path))
    with pytest.raises(MachineError, match=r"^waits failed: ValueError: first line$"):
        work("waits", "fail", {}, config, programs=waiting(tmp_path))
    with pytest.raises(MachineError, match=r"^waits failed: ModuleNotFoundError: pip install this-and-that$"):
        work("waits", "ask", {}, config, programs=waiting(tmp_path))


def test_a_process_that_dies_in_silence_is_not_said_to_have_said_what_another_did(tmp_path):
    (tmp_path / "log.txt").write_text("ValueError: of the run before\n")
    with pytest.raises(MachineError, match=r"^waits ended with code 9: it said nothing$"):
        work("waits", "die", {}, make(models=["x"]), log=tmp_path / "log.txt", programs=waiting(tmp_path))


@pytest.mark.parametrize("place", ["bin/python", "."])
def test_a_python_that_is_not_there_is_named(tmp_path, place):
    config = make(models=["x"], extra_eval_args={"python": str(tmp_path / place)})
    with pytest.raises(ConfigError, match="there is no Python at"):
        work("evalscope", "check", {}, config)


@pytest.mark.parametrize(
    ("name", "module", "hint"),
    [
        ("evalscope", "evalscope", "DIR/bin/pip install evalscope"),
        ("lm_eval", "lm_eval", "pip install 'swift-llm[lm_eval]'"),
        ("opencompass", "opencompass", "DIR/bin/pip install opencompass"),
        ("vlmevalkit", "vlmeval", "DIR/bin/pip install ms-vlmeval"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_what_installs_it(name, module, hint, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == module else find(wanted))
    with pytest.raises(DependencyError, match=f"the package {module} is not installed") as found:
        EVALUATORS.get(name).check(make(models=["x"], eval_backend=name))
    assert hint in found.value.hint
