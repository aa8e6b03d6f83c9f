"""A condition on the table of runs selects rows and does nothing else, whatever is written in it."""

import math
import re

import pandas
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from dlnb.track import RunRecord, best, prune, runs
from dlnb.tracking.query import mask

TABLE = pandas.DataFrame(
    {
        "run": ["a", "b", "c", "d"],
        "strategy": ["ddp", "ddp", "deepspeed_stage_3", None],
        "devices": [2, "auto", 8, 1],
        "lr": [1e-3, 3e-4, None, 1e-4],
        "step": [10, 20, 30, 40],
        "val/loss": [0.3, None, 0.2, 0.4],
        "nesterov": [True, False, None, True],
        "metrics.step": [1.0, 2.0, 3.0, 4.0],
        "started": pandas.to_datetime(["2026-11-20", "2026-11-22", "2026-11-24", None]),
    }
)
CODE = {  # name: (where, what the error says)
    "backticks in a text": ("run == '`@__import__(\"os\").system(\"touch {mark}\")`'.replace('`', '')", "is a call"),
    "an at sign": ("@os.system('touch {mark}')", "is not an expression"),
    "a method of a column": ("run.to_csv('{mark}') == 1", "is a call"),
    "a method in backticks": ("`run`.to_csv('{mark}') == 1", "is a call"),
    "a method of the text's": ("lr.map(open) == 1", "is a call"),
    "a pickle": ("run.to_pickle('{mark}') == 1", "is a call"),
    "an import": ("__import__('os').system('touch {mark}') == 0", "is a call"),
    "open": ("open('{mark}', 'w') == 1", "is a call"),
    "eval": ('eval(\'open("{mark}", "w")\') == 1', "is a call"),
    "a class's ways": ("().__class__.__base__.__subclasses__() == 1", "is a call"),
    "a class": ("lr.__class__ == 1", "'lr.__class__' is not known"),
    "an attribute of a number": ("(1).real == lr", "is not allowed"),
    "an attribute of a text": ("'a'.upper == run", "is not allowed"),
    "numpy through a column": ("lr.values == 1", "'lr.values' is not known"),
    "a lambda": ("(lambda: open('{mark}', 'w'))() == 1", "is a call"),
    "a list that is made": ("lr in [open('{mark}', 'w') for x in 'a']", "is not allowed"),
    "a walrus": ("(x := 3) < lr", "is not allowed"),
    "a formatted text": ("run == f'{open(chr(97))}'", "is a formatted text"),
    "a formatted path": ("run == f\"{open('{mark}', 'w')}\"", "is a formatted text"),
    "await": ("await lr", "is not a condition"),
    "yield": ("(yield lr)", "is not a condition"),
    "an index": ("lr[0] < 1", "is an index"),
    "a slice": ("lr[:] < 1", "is an index"),
    "a dictionary": ("lr in {1: 2}", "is not allowed"),
    "a starred list": ("lr in [*run]", "is not allowed"),
    "an if": ("1 if lr else 2", "is not a condition"),
    "two statements": ("lr < 1; open('{mark}', 'w')", "is not an expression"),
    "two lines": ("lr < 1\nopen('{mark}', 'w')", "is not an expression"),
    "an assignment": ("lr = 1", "is not an expression"),
    "an assignment of a new column": ("new = lr + 1", "is not an expression"),
    "an import statement": ("import os", "is not an expression"),
}
WORK = {
    "a tower of powers": ("10**10**10 > lr", "is arithmetic"),
    "a tower in a list": ("lr in [9**9**9]", "is arithmetic"),
    "a long text": ("run == 'a' * 10**10", "is arithmetic"),
    "a shift": ("lr < 1 << 10**9", "is arithmetic"),
    "a sum": ("lr + 1 < 2", "is arithmetic"),
    "a product of columns": ("lr * step > 1", "is arithmetic"),
    "a matrix product": ("lr @ lr > 1", "is arithmetic"),
    "a minus before a column": ("-lr < 1", "is not allowed"),
    "bits of a number": ("~5 < lr", "is not allowed"),
    "deep parentheses": ("(" * 300 + "lr < 1" + ")" * 300, "is not an expression"),
    "deep lists": ("lr in " + "[" * 100 + "]" * 100, "nested too deeply"),
    "deep not": ("not " * 3000 + "nesterov", "nested too deeply"),
    "deep minus": ("-" * 15_000 + "1 < lr", "nested too deeply"),
    "deep attributes": ("a" + ".a" * 5000 + " < 1", "nested too deeply"),
    "a deep chain of &": ("&".join(["(lr < 1)"] * 150), "nested too deeply"),
    "many comparisons": (" or ".join(["lr < 1"] * 1000), "200 are the most"),
    "a long chain": ("lr" + " < lr" * 500, "200 are the most"),
    "a long condition": ("lr < 1 or " * 10_000 + "lr < 1", "20000 are the most"),
    "a number of many digits": ("lr < " + "9" * 10_000, "is not an expression"),
}
WORDS = {
    "nothing": ("", "is not an expression"),
    "a blank": ("  ", "is not an expression"),
    "half a comparison": ("lr <", "is not an expression"),
    "a text without an end": ("run == 'a", "is not an expression"),
    "a backtick without an end": ("`val/loss < 1", "is not an expression"),
    "two backticks without a name": ("`` < 1", "column='' is not known"),
    "a NUL byte": ("lr < 1\0", "is not an expression"),
    "half a surrogate": ("run == '\ud800'", "is not an expression"),
    "a number instead": (5, "must be a text"),
    "a list instead": (["lr < 1"], "must be a text"),
    "bytes instead": (b"lr < 1", "must be a text"),
    "bytes in it": ("run == b'a'", "is not allowed"),
    "a complex number": ("lr < 1j", "is not allowed"),
    "an ellipsis": ("lr < ...", "is not allowed"),
    "an unknown column": ("vall_loss < 1", "Did you mean 'val/loss'?"),
    "an unknown column in backticks": ("`val/los` < 1", "Did you mean 'val/loss'?"),
    "another case": ("LR < 1", "Did you mean 'lr'?"),
    "a true of another language": ("nesterov == true", "'true' is not known"),
    "a column in quotes": ("'lr' < 1", "compares no column"),
    "two numbers": ("1 < 2", "compares no column"),
    "a chain that begins with two": ("0 < 1 < lr", "compares no column"),
    "a number alone": ("1", "is not a condition"),
    "True alone": ("True", "is not a condition"),
    "a column of numbers alone": ("lr", "which is not a condition"),
    "a column of zeros alone": ("not step", "which is not a condition"),
    "text below a number": ("run < 3", "true of no row"),
    "a number below a text": ("step >= 'a'", "true of no row"),
    "a date below a number": ("started < 3", "true of no row"),
    "no date": ("started > 'yesterday'", "what is not a date"),
    "a date of another order": ("started > '24.11.2026'", "what is not a date"),
    "a day that is none": ("started > '2026-13-41'", "what is not a date"),
    "no date in a list": ("started in ['2026-11-20', 'x']", "what is not a date"),
    "equal to a list": ("lr == [1, 2]", "take a list"),
    "a list on the left": ("[1, 2] == lr", "take a list"),
    "in a text": ("strategy in 'ddp'", "take a list"),
    "in a number": ("lr in 3", "take a list"),
    "a number in a column": ("3 in run", "true of no row"),
    "a list in a column": ("['a'] in run", "take a list"),
    "a column in a list": ("lr in [step]", "is a column in a list"),
    "a list in a list": ("lr in [[1], 2]", "is a list of lists"),
    "below None": ("lr < None", "ask whether a value is missing"),
    "is a number": ("lr is 3", "ask whether a value is missing"),
    "in None": ("lr in None", "take a list"),
    "a comparison compared": ("(lr < 1) == True", "is a condition where a value belongs"),
    "& without parentheses": ("lr < 1 & step > 3", "need parentheses"),
    "SQL's equals": ("strategy = 'ddp' AND lr < 1", "is not an expression"),
    "SQL's unequal": ("strategy <> 'ddp'", "is not an expression"),
    "another language's and": ("lr < 1 && step > 3", "is not an expression"),
}
REFUSED = CODE | WORK | WORDS
SELECTED = {  # where: the rows
    "lr < 1e-3": "bd",
    "1e-4 <= lr < 1e-3": "bd",
    "lr < 1e-3 and step > 20 or run == 'a'": "ad",
    "(lr < 1e-3) & (step > 20) | (run == 'a')": "ad",
    "not lr == 1e-3": "bcd",
    "lr != 1e-3": "bd",
    "~(lr == 1e-3)": "bcd",
    "lr == None": "c",
    "None == lr": "c",
    "lr is not None": "abd",
    "lr in [1e-3, None]": "ac",
    "lr not in (1e-3,)": "bd",
    "lr not in {None, 1e-3}": "bd",
    "`val/loss` < 0.35": "ac",
    "`val/loss`<0.35 and`lr`>0": "a",
    "metrics.step > 2": "cd",
    "`metrics.step` > 2": "cd",
    "nesterov": "ad",
    "not nesterov": "bc",
    "nesterov == True": "ad",
    "nesterov == 0": "b",
    "devices == 2": "a",
    "devices == 'auto'": "b",
    "devices != 2": "bcd",
    "devices > 1": "ac",
    "devices == '2'": "",
    "strategy in ['ddp', 'fsdp']": "ab",
    "'deepspeed' in strategy": "c",
    "'deepspeed' not in strategy": "ab",
    "run == '`lr`'": "",
    "started > '2026-11-20'": "bc",
    "started == '2026-11-22T01:00+01:00'": "b",
    "started in ['2026-11-20', '2026-11-24']": "ac",
    "started >= '2026-12'": "",
    "started == None": "d",
    "'2026-11-21' < started < '2026-11-23T00:00Z'": "b",
    "lr < 1e999": "abd",
    "lr > -1": "abd",
    "step < " + "9" * 400: "abcd",
    "lr < step": "abd",
    "(lr < 1 # a comment with `val/loss\n and step > 10)": "bd",
}


@pytest.fixture
def root(tmp_path):
    "A run, for conditions that come as far as a table."
    RunRecord(folder=tmp_path / "runs" / "one", settings={"lr": 0.1}, status="finished").write()
    return tmp_path / "runs"


@pytest.mark.parametrize("where, told", REFUSED.values(), ids=REFUSED)
def test_what_is_more_than_a_comparison_is_refused_in_a_sentence(where, told):
    with pytest.raises(ValueError) as error:
        mask(TABLE, where)
    assert told in str(error.value) and str(error.value).startswith("where=") and len(str(error.value)) < 1200
    assert "column_" not in str(error.value)


ACT = """
run == '`' or @os.system('touch {mark}') == '`'
`run` == '`' and 1 == @shutil.os.system('touch {mark}') and '`' == run
run != '`' and @Path('{mark}').touch() == '`'
@os.system('touch {mark}') == 0
run.to_csv('{mark}') == 1
`run`.to_csv('{mark}') == 1
run == '`lr`' or run.to_csv('{mark}')
run.to_pickle('{mark}') == 1
run.to_json('{mark}') == 1
""".strip().splitlines()


@pytest.mark.parametrize("where", ACT)
@pytest.mark.parametrize("search", [runs, best, prune], ids=lambda search: search.__name__)
def test_no_condition_runs_anything(root, tmp_path, where, search):
    with pytest.raises(ValueError, match="^where="):
        search(root, where=where.format(mark=tmp_path / "mark"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("where", SELECTED)
def test_a_condition_selects_the_rows_of_which_it_is_true(where):
    assert "".join(TABLE["run"][mask(TABLE, where)]) == SELECTED[where]


def test_the_package_evaluates_no_text():
    modules = [path for path in (REPOSITORY / "dlnb").rglob("*.py") if path.name != "notebook.py"]
    assert len(modules) > 20  # a notebook's code is imported, as a file's is
    for module in modules:
        assert not re.search(r"(?<![\w.])(?<!def )eval\(|\.query\(|pandas\.eval|numexpr|(?<![\w.])exec\(", module.read_text()), module.name


def test_an_empty_table_and_one_of_any_index_have_a_mask():
    assert mask(TABLE.head(0), "lr < 1").tolist() == []
    table = TABLE.set_index("run").loc[["c", "a"]]
    assert mask(table, "step > 10").to_dict() == {"c": True, "a": False}


# A straightforward reading, of which each word is Python's: a tree is a text and a function of a row.
LITERALS = st.one_of(st.integers(-3, 3), st.sampled_from([0.5, -1.5, 2.0, "a", "ab", "b", True, False, None]))
COLUMNS = {"x": "x", "y.z": "y.z", "val/loss": "`val/loss`", "t": "t"}
TRUTHS = {
    "==": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
}  # fmt: skip


def truth(sign, a, b):
    if a is None or b is None:
        return False
    if isinstance(a, str) != isinstance(b, str):
        return sign == "!="
    return TRUTHS[sign](a, b)


@st.composite
def comparisons(draw):
    name, sign = draw(st.sampled_from([*COLUMNS])), draw(st.sampled_from([*TRUTHS, "in", "not in"]))
    if sign in ("in", "not in"):
        items = draw(st.lists(LITERALS, max_size=4))

        def is_in(row):
            found = any(truth("==", row[name], item) for item in items) or (row[name] is None and None in items)
            return found if sign == "in" else not found and row[name] is not None

        return f"{COLUMNS[name]} {sign} {items!r}", is_in
    if draw(st.booleans()):
        other = draw(st.sampled_from([*COLUMNS]))
        return f"{COLUMNS[name]} {sign} {COLUMNS[other]}", lambda row: truth(sign, row[name], row[other])
    value = draw(LITERALS.filter(lambda value: value is not None or sign in ("==", "!=")))
    if value is None:
        return f"{COLUMNS[name]} {sign} None", lambda row: (row[name] is None) == (sign == "==")
    return f"{value!r} {sign} {COLUMNS[name]}", lambda row: truth(sign, value, row[name])


def join(parts):
    word, (one, first), (other, second) = parts
    if word == "not":
        return f"not ({one})", lambda row: not first(row)
    both = (lambda row: first(row) and second(row)) if word in ("and", "&") else (lambda row: first(row) or second(row))
    return f"({one}) {word} ({other})", both


CONDITIONS = st.recursive(
    comparisons(), lambda parts: st.tuples(st.sampled_from(["and", "or", "not", "&", "|"]), parts, parts).map(join), max_leaves=8
)
ROWS = st.lists(st.fixed_dictionaries({name: LITERALS for name in COLUMNS}), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=ROWS, condition=CONDITIONS)
def test_the_mask_is_what_python_finds_row_by_row(rows, condition):
    where, holds = condition
    try:
        found = mask(pandas.DataFrame(rows, columns=[*COLUMNS]), where).tolist()
    except ValueError as error:  # an order that is of no row
        assert "which is true of no row" in str(error)
    else:
        assert found == [holds(row) for row in rows]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(
    "lr step run `val/loss` ` ' \" ( ) [ ] , . not and or in is < == != & | ~ - ** @ : = 1 'a' None True lambda if \n".split(" ")
), max_size=14).map(" ".join)))  # fmt: skip
def test_any_text_is_a_mask_or_a_sentence(where):
    try:
        assert mask(TABLE, where).dtype == bool
    except ValueError as error:
        assert str(error).startswith("where=")


def test_nan_is_missing():
    assert mask(pandas.DataFrame({"x": [math.nan, 1.0]}), "x != 2").tolist() == [False, True]
