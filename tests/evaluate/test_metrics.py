"""Equality, overlap and programs, with values worked by hand or given by the libraries that are named."""

import time

import pytest

from swift.errors import ConfigError, DataError
from swift.evaluate.judging import Found, Judged, Setting
from swift.evaluate.metrics import METRICS, limited
from swift.evaluate.metrics.code import program_of
from swift.evaluate.metrics.limited import Limits, isolation, run_limited
from swift.evaluate.metrics.numbers import same_math


def judged(name, found, *golds, **options):
    metric = METRICS.get(name)(Setting("t", options))
    return metric.judge(Judged(found or "", Found(found, "text"), golds)).metrics


@pytest.mark.parametrize(
    ("name", "found", "golds", "value"),
    [
        ("acc", "B", ["B"], 1),
        ("acc", "b", ["A", "B"], 1),
        ("acc", "C", ["A", "B"], 0),
        ("acc", None, [""], 0),
        ("f1", None, ["The"], 0),  # a right answer without words but articles
        ("exact_match", "The  Eiffel-Tower!", ["eiffeltower"], 1),
        ("exact_match", "北京。", ["北京"], 1),
        ("exact_match", "2.5", ["25"], 0),
        ("exact_match", "1,000", ["1000"], 1),
        ("exact_match", "a cat", ["cats"], 0),
        ("number", "18.00", ["18"], 1),
        ("number", "1/2", ["0.5"], 1),
        ("number", "18", ["18 dollars"], 0),
        ("number", None, ["0"], 0),
        ("math", "\\dfrac{1}{2}", ["\\frac12"], 1),
        ("math", "0.5", ["\\frac{1}{2}"], 1),
        ("math", None, [""], 0),
    ],
)
def test_equal_answers_count_one(name, found, golds, value):
    (number,) = judged(name, found, *golds).values()
    assert number == value


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("$x=5$", "5", True),
        ("5\\text{ cm}", "5", True),
        ("90^\\circ", "90", True),
        ("10,000", "10000", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})", True),
        ("(1, 2)", "[1, 2)", False),
        ("(0.5, 2)", "(\\frac{1}{2}, 2)", True),
        ("(1, 2)", "(2, 1)", False),
        ("\\sqrt3", "\\sqrt{3}", True),
        ("1, 2", "12", False),
        ("10{,}000", "10,000", True),
        ("3\\,x", "3x", True),
        ("5\\text{ miles}", "5", True),
        ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}", True),
        ("\\frac ab", "\\frac{a}{b}", True),
        ("\\frac1{72}", "\\frac{1}{72}", True),
        ("$x^2$.", "x^2", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"\begin{pmatrix}1 \\ 2\end{pmatrix}", r"\begin{pmatrix} 12 \end{pmatrix}", False),
        ("50\\%", "50", True),
        ("\\text{Tuesday}", "Tuesday", True),
        ("x^2+1", "1+x^2", False),  # no algebra is done
        ("", "", False),
    ],
)
def test_expressions_are_equal_as_far_as_writing_goes(one, other, is_same):
    assert same_math(one, other) is is_same


def test_f1_counts_shared_words():
    assert judged("f1", "the snow in Nanjing", "snow")["f1"] == 0.5  # "snow in nanjing": P 1/3, R 1
    assert judged("f1", "snow", "ice", "snow")["f1"] == 1
    assert judged("f1", "南京有雪", "南京大雪")["f1"] == 0.75  # 3 of 4 characters each
    assert judged("f1", None, "snow")["f1"] == 0


def test_a_metric_without_options_refuses_one():
    with pytest.raises(ConfigError, match="task t: unknown option 'stem'"):
        judged("f1", "a", "a", stem=True)
    with pytest.raises(ConfigError, match="unknown metric of written answers 'rouges'"):
        METRICS.get("rouges")


HUMANEVAL = {
    "prompt": 'import math\n\n\ndef area(r):\n    """Of a circle."""\n',
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(1) - math.pi) < 1e-9\n    assert candidate(0) == 0\n",
}
MBPP = {"test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": ""}


@pytest.mark.parametrize(
    ("fields", "code", "passes"),
    [
        (HUMANEVAL, "    return math.pi * r**2\n", True),
        (HUMANEVAL, "def area(r):\n    return math.pi * r**2\n", True),
        (HUMANEVAL, "    return 2 * math.pi * r\n", False),
        (HUMANEVAL, "    return (", False),
        (MBPP, "def add(a, b):\n    return a + b", True),
        (MBPP, "def add(a, b):\n    return a - b", False),
    ],
)
def test_a_program_passes_if_its_tests_do(fields, code, passes):
    metric = METRICS.get("pass")(Setting("t", arguments={"run_code": True}))
    verdict = metric.judge(Judged(code, Found(code, "text"), (), fields))
    assert verdict.metrics == {"pass@1": float(passes)}
    assert (verdict.detail["ran"] == "passed") is passes


def test_nothing_is_run_unless_the_user_allows_it():
    with pytest.raises(ConfigError, match="runs the programs that the model writes") as caught:
        METRICS.get("pass")(Setting("humaneval"))
    assert '{"humaneval": {"run_code": true}}' in caught.value.hint
    with pytest.raises(ConfigError, match="runs the programs"):
        METRICS.get("pass")(Setting("humaneval", arguments={"run_code": "yes"}))


def test_a_row_without_tests_is_refused():
    with pytest.raises(DataError, match="no tests"):
        program_of({"question": "?"}, "")


SHORT = Limits(timeout_s=2, memory_mib=256, file_mib=1)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = 1", "passed"),
        ("assert 1 == 2, 'no'", "a test fails: no"),
        ("while True: pass", "it takes more than 2 s"),
        ("x = bytearray(2**30)", "more memory than the limit"),
        ("raise SystemExit(0)", "it ends itself"),
        ("import os; os._exit(0)", "it ends itself"),
        ("import ctypes; ctypes.string_at(0)", None),
        ("open('big', 'wb').write(bytes(2**22))", None),
        ("import os; assert os.environ.get('SECRET') is None; assert os.listdir('.') == []", "passed"),
        ("print('x' * 10**6)", "passed"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_program_is_kept_in_its_limits(program, reason, monkeypatch):
    monkeypatch.setenv("SECRET", "s")
    ran = run_limited(program, SHORT)
    assert ran.passed is (reason == "passed")
    assert reason is None or ran.reason == reason


@pytest.mark.skipif(not isolation(), reason="this system lets nobody make a network of his own")
def test_a_program_has_no_network():
    assert run_limited("import socket; socket.create_connection(('127.0.0.1', 9), 1)", SHORT).reason.startswith("OSError: [Errno 101]")


@pytest.fixture
def may_fork(monkeypatch):
    """Programs may start others, whoever runs the tests: for users that are not root the limit of processes forbids it."""
    resources = limited._resources
    monkeypatch.setattr(limited, "_resources", lambda limits: {k: v for k, v in resources(limits).items() if k != "RLIMIT_NPROC"})


def test_a_program_whose_child_leaves_it_is_not_waited_for(monkeypatch, may_fork):
    monkeypatch.setattr(limited, "isolation", lambda: ())
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(8)\n    os._exit(0)\n"
    begin = time.monotonic()
    assert run_limited(program, Limits(timeout_s=0.5)).reason == "it takes more than 0.5 s"
    assert time.monotonic() - begin < 6


def test_what_a_program_has_begun_ends_with_it(tmp_path, may_fork):
    file = tmp_path / "alive"
    child = f"import time\nfor _ in range(400):\n    open({str(file)!r}, 'a').write('x'); time.sleep(0.05)"
    begin = f"import os, subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
    assert run_limited(f"{begin}while not os.path.exists({str(file)!r}): time.sleep(0.01)", Limits(timeout_s=20)).passed
    size = file.stat().st_size
    time.sleep(0.3)
    assert file.stat().st_size == size
