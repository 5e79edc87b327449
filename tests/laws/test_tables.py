"""Tables of mixtures and losses, of whatever tool, become the same runs, or an error that helps."""

import csv
import gzip
import io
import json

import numpy as np
import pytest

from llmmix.laws.tables import read_runs

RATIOS = "run_id,name,code,docs\na,first,0.25,0.75\nb,second,0.5,0.5\nc,third,1,0\n"
METRICS = "run_id,name,code_val_loss,docs_val_loss\na,first,3.5,2\nb,second,3,2.5\nc,third,1,4\n"
MIXTURES = [[0.25, 0.75], [0.5, 0.5], [1, 0]]
LOSSES = [[3.5, 2], [3, 2.5], [1, 4]]


def write(folder, ratios=RATIOS, metrics=METRICS, ending=".csv"):
    paths = folder / f"ratios{ending}", folder / f"metrics{ending}"
    for path, text in zip(paths, (ratios, metrics), strict=True):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return paths


def read(folder, ratios=RATIOS, metrics=METRICS, ending=".csv"):
    return read_runs(*write(folder, ratios, metrics, ending))


def refused(folder, ratios=RATIOS, metrics=METRICS):
    with pytest.raises(ValueError) as raised:
        read(folder, ratios, metrics)
    return str(raised.value)


def named(header, rows):
    """Tables of the given columns, with the values of RATIOS or METRICS."""
    lines = (",".join([run, *map(str, row)]) for run, row in zip("abc", rows, strict=True))
    return "\n".join([",".join(["run", *header]), *lines, ""])


def check_same(runs):
    assert runs.ids == ["a", "b", "c"]
    assert (runs.domains, runs.targets) == (["code", "docs"], ["code", "docs"])
    np.testing.assert_array_equal(runs.mixtures, MIXTURES)
    np.testing.assert_array_equal(runs.losses, LOSSES)


# Formats


def test_a_sweep_of_ours_is_read(tmp_path):
    runs = read(tmp_path)
    check_same(runs)
    assert runs.mixtures.dtype == runs.losses.dtype == np.float64
    assert runs.notes == []  # a run's other names are no loss


def test_what_a_sweep_writes_is_what_is_read(tmp_path):
    from llmmix.laws.sweep import SweepArguments, add, choose_mixtures

    mixtures = choose_mixtures(SweepArguments(mixtures=5), np.array([0.2, 0.3, 0.5]), seed=1)
    losses = np.random.default_rng(0).uniform(1, 5, (5, 2))
    for i, (shares, row) in enumerate(zip(mixtures, losses, strict=True)):
        add(tmp_path / "ratios.csv", f"run-{i:04d}", dict(zip("abc", shares, strict=True)))
        add(tmp_path / "metrics.csv", f"run-{i:04d}", {"a_val_loss": row[0], "b_val_loss": row[1]})
    runs = read_runs(str(tmp_path / "ratios.csv"), str(tmp_path / "metrics.csv"))
    assert runs.ids == [f"run-{i:04d}" for i in range(5)]
    assert (runs.domains, runs.targets) == (["a", "b", "c"], ["a", "b"])
    np.testing.assert_allclose(runs.mixtures, mixtures, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(runs.losses, losses)


def test_regmix_names_and_rounded_shares(tmp_path):
    ratios = (
        "index,train_the_pile_arxiv,train_the_pile_pile_cc,train_the_pile_pubmed_abstracts\n"
        "1,0.333,0.333,0.333\n2,0.0,1.0,0.0\n"
    )
    metrics = (
        "index,metric/the_pile_arxiv_val_loss,metric/the_pile_pile_cc_val_loss\r\n"
        "1,4.5,3.25\r\n2,6,2\r\n"
    )
    runs = read(tmp_path, ratios, metrics)
    assert runs.ids == ["1", "2"]
    assert runs.domains == ["arxiv", "pile_cc", "pubmed_abstracts"]
    assert runs.targets == ["arxiv", "pile_cc"]
    np.testing.assert_allclose(runs.mixtures, [[1 / 3] * 3, [0, 1, 0]], rtol=1e-15)
    np.testing.assert_array_equal(runs.losses, [[4.5, 3.25], [6, 2]])
    (note,) = runs.notes
    assert "1 of 2 runs" in note and "0.999" in note


def test_olmix_tables_take_run_for_run_id_and_leave_name_and_index_out(tmp_path):
    ratios = "run,name,Index,dclm,wiki\nhz,s-0,0,0.5,0.5\npj,s-1,1,0.25,0.75\n"
    metrics = (
        ",run_id,name,index,eval/lm/wiki/CE loss,eval/lm/dclm/CE loss\n"
        "0,pj,s-1,0,1.5,2.5\n1,hz,s-0,1,1.25,2.25\n"
    )
    runs = read(tmp_path, ratios, metrics)
    assert runs.ids == ["hz", "pj"]
    assert (runs.domains, runs.targets) == (["dclm", "wiki"], ["wiki", "dclm"])
    np.testing.assert_array_equal(runs.losses, [[1.25, 2.25], [1.5, 2.5]])
    (note,) = runs.notes
    assert "unnamed column 1" in note


@pytest.mark.parametrize("separator", ["\t", ";"])
def test_other_separators(tmp_path, separator):
    check_same(read(tmp_path, *(t.replace(",", separator) for t in (RATIOS, METRICS)), ".tsv"))


def test_a_separator_within_quotes_is_part_of_a_name(tmp_path):
    metrics = 'run,x\na,"2"\n'
    for ratios in (
        'run;"code, etc";docs\na;0.25;0.75\n',
        'run, "code, etc", docs\na, "0.25", 0.75\n',
    ):
        assert read(tmp_path, ratios, metrics).domains == ["code, etc", "docs"]


@pytest.mark.parametrize("lines", [1, 4])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_quoted_cells_are_the_same_cells(tmp_path, separator, lines):
    tables = []
    for text in (RATIOS, METRICS):
        rows = [line.split(",") for line in text.splitlines()]
        rows = [[f'"{c}"' if i < lines else c for c in row] for i, row in enumerate(rows)]
        tables.append("\n".join(separator.join(row) for row in rows))
    check_same(read(tmp_path, *tables))


def test_a_quoted_cell_may_hold_line_ends_and_separators(tmp_path):
    ratios = RATIOS.replace("first", '"one,\ntwo,\nthree,,"')
    check_same(read(tmp_path, ratios))
    assert "ratios.csv, line 5" in refused(tmp_path, ratios.replace("second,0.5", "second,-1"))


@pytest.mark.parametrize("text", ['run_id,code,docs\na,"0.2"5,0.75\n', '"run_id,code\na,0.5\n'])
def test_broken_quotes_are_refused(tmp_path, text):
    assert "Mend its quotes" in refused(tmp_path, text)


@pytest.mark.parametrize("change", [b"\r\n", b"\r", b"\n\n", b" \n"])
def test_line_ends_and_blank_lines_change_nothing(tmp_path, change):
    check_same(read(tmp_path, *(t.encode().replace(b"\n", change) for t in (RATIOS, METRICS))))


def test_a_byte_order_mark_and_spaces_change_nothing(tmp_path):
    texts = (b"\xef\xbb\xbf" + t.replace(",", " , ").encode() for t in (RATIOS, METRICS))
    check_same(read(tmp_path, *texts))


def test_a_trailing_separator_is_no_column(tmp_path):
    check_same(read(tmp_path, *(t.replace("\n", ",\n") for t in (RATIOS, METRICS))))


def test_json_lines(tmp_path):
    ratios = [
        {"run_id": r, "code": x, "docs": y} for r, (x, y) in zip("abc", MIXTURES, strict=True)
    ]
    metrics = [
        {"docs_val_loss": y, "run_id": r, "code_val_loss": x}
        for r, (x, y) in zip("abc", LOSSES, strict=True)
    ]
    del metrics[1]["code_val_loss"]
    metrics[2]["docs_val_loss"] = None
    runs = read(tmp_path, *("\n".join(map(json.dumps, t)) for t in (ratios, metrics)), ".jsonl")
    assert (runs.domains, runs.targets) == (["code", "docs"], ["docs", "code"])
    np.testing.assert_array_equal(runs.losses, [[2, 3.5], [2.5, np.nan], [np.nan, 1]])


@pytest.mark.parametrize("text", ['[{"run": 1}, 2]', '{"run": "a",\n"code": 1}', '{"run": 1}\n[1]'])
def test_json_that_is_no_object_a_line_is_refused(tmp_path, text):
    message = refused(tmp_path, metrics=text)
    assert "metrics.csv, line " in message and "JSON object" in message


# The run's id


def test_runs_are_joined_by_id_in_the_order_of_the_ratios(tmp_path):
    header, *lines = METRICS.splitlines()
    check_same(read(tmp_path, metrics="\n".join([header, *lines[::-1]])))
    header, *lines = RATIOS.splitlines()
    runs = read(tmp_path, ratios="\n".join([header, *lines[::-1]]))
    assert runs.ids == ["c", "b", "a"]
    np.testing.assert_array_equal(runs.mixtures, MIXTURES[::-1])
    np.testing.assert_array_equal(runs.losses, LOSSES[::-1])


@pytest.mark.parametrize(
    ("left", "right", "chosen"),
    [
        ("run_id,index", "index,run_id", "run_id"),
        ("index,run", "run,index", "run"),
        ("name,index", "index,name", "index"),
        ("name,id", "id,name", "id"),
        ("Name,group", "group,NAME", "name"),
        ("run_id,name", "name,other", "name"),
        (",name", ",name", "name"),
    ],
)
def test_the_best_id_in_both_tables_is_chosen(tmp_path, left, right, chosen):
    """The other column would join the runs the other way round, or not at all."""

    def table(header, values, flip):
        at = [name.lower() for name in header.split(",")].index(chosen)
        lines = []
        for i, value in enumerate(values):
            cells = [f"x{i ^ flip}", f"x{i ^ flip}"]
            cells[at] = f"id{i}"
            lines.append(",".join([*cells, *map(str, value)]))
        return "\n".join([header + ",p,q", *lines])

    runs = read(tmp_path, table(left, MIXTURES[:2], 0), table(right, LOSSES[:2], 1))
    assert runs.ids == ["id0", "id1"]
    np.testing.assert_array_equal(runs.losses, LOSSES[:2])


def test_an_unnamed_first_column_is_the_id_where_nothing_better_is(tmp_path):
    tables = [t.replace("run_id,name", ",group") for t in (RATIOS, METRICS)]
    check_same(read(tmp_path, *tables))


@pytest.mark.parametrize("first", ["", "Unnamed: 0"])
def test_an_unnamed_first_column_is_left_out_where_something_better_is(tmp_path, first):
    tables = []
    for text in (RATIOS, METRICS):
        header, *lines = text.splitlines()
        numbered = [f"{i},{line}" for i, line in enumerate(lines)]
        tables.append("\n".join([f"{first},{header}", *numbered]))
    check_same(read(tmp_path, *tables))


def test_an_index_that_pandas_wrote_twice_is_no_target(tmp_path):
    metrics = ",Unnamed: 0,run_id,x_loss,y_loss\n0,0,a,3,2\n1,1,b,4,5\n"
    assert read(tmp_path, metrics=metrics).targets == ["x", "y"]


def test_no_id_in_both_tables_lists_the_columns_of_each(tmp_path):
    message = refused(tmp_path, metrics=METRICS.replace("run_id,name", "experiment,group"))
    for part in ("ratios.csv has run_id, name", "metrics.csv has experiment", "run_id in both"):
        assert part in message


def test_ids_written_as_floats_join_those_written_as_integers(tmp_path):
    metrics = METRICS.replace("\na,", "\n1.0,").replace("\nb,", "\n2.00,").replace("\nc,", "\n-3,")
    ratios = RATIOS.replace("\na,", "\n1,").replace("\nb,", "\n2,").replace("\nc,", "\n-3.0,")
    runs = read(tmp_path, ratios, metrics)
    assert runs.ids == ["1", "2", "-3"]
    np.testing.assert_array_equal(runs.losses, LOSSES)


def test_ids_that_only_look_like_numbers_stay_apart(tmp_path):
    tables = [
        t.replace("\na,", "\n007,").replace("\nb,", "\n7,").replace("\nc,", "\n1e3,")
        for t in (RATIOS, METRICS.replace("\nc,", "\n1000,"))
    ]
    runs = read(tmp_path, *tables)
    assert runs.ids == ["007", "7"]
    assert ["1e3" in note for note in runs.notes].count(True) == 1


def test_runs_of_one_table_alone_are_dropped_counted_and_named(tmp_path):
    more = "".join(f"d{i},x,1,0\n" for i in range(5))
    runs = read(tmp_path, RATIOS + more, METRICS.replace("\nb,", "\ne,"))
    assert runs.ids == ["a", "c"]
    np.testing.assert_array_equal(runs.mixtures, [MIXTURES[0], MIXTURES[2]])
    np.testing.assert_array_equal(runs.losses, [LOSSES[0], LOSSES[2]])
    dropped = [note for note in runs.notes if "dropped" in note]
    assert "6 of 8 runs of `ratios`" in dropped[0] and dropped[0].endswith("b, d0, d1 and 3 more.")
    assert "1 of 3 runs of `metrics`" in dropped[1] and dropped[1].endswith(": e.")


def test_no_run_in_common_says_what_ids_each_table_has(tmp_path):
    metrics = METRICS.replace("\na,", "\nx,").replace("\nb,", "\ny,").replace("\nc,", "\nz,")
    message = refused(tmp_path, metrics=metrics)
    assert "a, b, c" in message and "x, y, z" in message


@pytest.mark.parametrize("table", ["ratios", "metrics"])
def test_an_id_that_stands_twice_is_named_with_its_lines(tmp_path, table):
    tables = {"ratios": RATIOS, "metrics": METRICS}
    tables[table] = tables[table].replace("\nc,", "\na,")
    message = refused(tmp_path, **tables)
    assert f"`{table}`" in message and "a in lines 2, 4" in message


def test_an_empty_id_is_refused_with_its_line(tmp_path):
    assert "line 3" in refused(tmp_path, RATIOS.replace("\nb,", "\n,"))


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(RATIOS.encode(), mtime=0)[:-9]])
def test_a_table_that_cannot_be_unpacked_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"`ratios`: .*ratios\.csv\.gz cannot be read"):
        read(tmp_path, content, content, ending=".csv.gz")


def test_tables_in_odd_places_and_shapes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "a[1] *"
    folder.mkdir()
    write(
        folder,
        *(gzip.compress(text.encode(), mtime=0) for text in (RATIOS, METRICS)),
        ending=".csv.gz",
    )
    check_same(read_runs(*(f"~/a[1] */{name}.csv.gz" for name in ("ratios", "metrics"))))
    as_lists = [
        json.dumps(list(csv.DictReader(io.StringIO(text))), indent=1) for text in (RATIOS, METRICS)
    ]
    check_same(read(folder, *as_lists, ending=".json"))
    assert "line 1 is no JSON" in refused(folder, "[1", "[1")


# Shares


@pytest.mark.parametrize("cell", ["", "nan", "much", "inf", "-0.1", "0_1", "50%"])
def test_a_share_that_is_none_is_named_by_line_and_column(tmp_path, cell):
    message = refused(tmp_path, RATIOS.replace("b,second,0.5", f"b,second,{cell}"))
    assert "`ratios`" in message and "line 3" in message and "'code'" in message
    assert repr(cell) in message


def test_percentages_are_refused_as_such(tmp_path):
    message = refused(tmp_path, "run_id,code,docs\na,25,75\nb,0.4,99.7\n")
    assert "sum to 100" in message and "Divide" in message


@pytest.mark.parametrize("cells", ["25%,75%", "0,25%"])
def test_a_column_of_percent_signs_is_no_column_of_words(tmp_path, cells):
    message = refused(tmp_path, f"run_id,code,docs\na,{cells}\n")
    assert "%' is no number" in message


def test_decimal_commas_are_refused(tmp_path):
    message = refused(tmp_path, "run_id;code;docs\na;0,25;0,75\nb;0,5;0,5\n")
    assert "'0,25' is no number" in message


@pytest.mark.parametrize(
    ("name", "values"),
    [("step", (100, 500, 900)), ("Unnamed: 9", (0, 1, 2)), ("epoch", (1, 1, 1)), ("n", (7, 0, 3))],
)
def test_a_number_that_is_no_share_is_named(tmp_path, name, values):
    header, *lines = RATIOS.splitlines()
    lines = [f"{line},{value}" for line, value in zip(lines, values, strict=True)]
    message = refused(tmp_path, "\n".join([f"{header},{name}", *lines]))
    assert f"without {name} ({values[0]} in the first)" in message and "Remove" in message


def test_several_numbers_that_are_no_shares_are_named_together(tmp_path):
    message = refused(
        tmp_path,
        "run,code,docs,step,tokens\na,0.5,0.5,10,1e9\nb,1,0,20,2e9\n",
        METRICS.replace("run_id", "run"),
    )
    assert "step (10 in" in message and "tokens (1e+09 in" in message and "code" not in message


def test_bookkeeping_of_zeros_is_no_domain(tmp_path):
    header, *lines = RATIOS.splitlines()
    runs = read(tmp_path, "\n".join([f"{header},seed,rare", *(f"{line},0,0" for line in lines)]))
    assert runs.domains == ["code", "docs", "rare"]
    assert any("seed" in note for note in runs.notes)


def test_shares_that_do_not_sum_to_one_are_named_by_line(tmp_path):
    message = refused(tmp_path, RATIOS.replace("0.5,0.5", "0.5,0.3"))
    assert "ratios.csv, line 3" in message and "0.8" in message


def test_tables_the_wrong_way_round_are_suspected(tmp_path):
    message = refused(tmp_path, METRICS, RATIOS)
    assert "right way round" in message


def test_words_beside_the_shares_are_left_out_with_a_note(tmp_path):
    ratios = "run_id,group,code,done,docs\na,x,0.25,True,0.75\nb,y,0.5,False,0.5\nc,,1,True,0\n"
    runs = read(tmp_path, ratios)
    check_same(runs)
    assert any("`ratios`" in note and "group, done" in note for note in runs.notes)


def test_no_domain_and_no_target_are_refused(tmp_path):
    assert "domain's shares" in refused(tmp_path, "run_id,name\na,x\n")
    assert "target's losses" in refused(tmp_path, metrics="run_id,name,step\na,x,4\n")


# Losses


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "inf", "-inf", "NA", "null"])
def test_a_loss_that_is_missing_is_nan_and_counted(tmp_path, cell):
    runs = read(tmp_path, metrics=METRICS.replace("b,second,3,", f"b,second,{cell},"))
    np.testing.assert_array_equal(runs.losses, [[3.5, 2], [np.nan, 2.5], [1, 4]])
    assert any("1 of 6 losses" in note and "code" in note for note in runs.notes)


def test_a_word_among_losses_is_refused(tmp_path):
    metrics = METRICS.replace("b,second,3,", "b,second,crashed,")
    refused(tmp_path, metrics=metrics.replace("3.5,", "3.5e0,").replace("third,1,", "third,1e0,"))
    message = refused(tmp_path, metrics=metrics)
    assert "metrics.csv, line 3, column 'code_val_loss': 'crashed'" in message


def test_bookkeeping_and_words_are_no_targets_and_a_constant_column_is(tmp_path):
    header = "run_id,state,step,x_loss,train/global_step,Total Tokens,eval_runtime,flat_loss,_step"
    runs = read(tmp_path, metrics=f"{header}\na,ok,5,3,5,9,1.5,2,7\nb,,6,4,6,9,1.5,2,7\n")
    assert runs.targets == ["x", "flat"]
    np.testing.assert_array_equal(runs.losses, [[3, 2], [4, 2]])
    (note,) = (note for note in runs.notes if "`metrics`: left out" in note)
    for name in ("state", "step", "train/global_step", "Total Tokens", "eval_runtime", "_step"):
        assert f" {name}" in note


def test_a_target_without_a_loss_among_the_joined_runs_is_left_out(tmp_path):
    metrics = "run_id,a_loss,b_loss,c_loss\na,1,,\nb,2,,nan\nz,3,5,inf\n"
    runs = read(tmp_path, metrics=metrics)
    assert runs.targets == ["a"]
    np.testing.assert_array_equal(runs.losses, [[1], [2]])
    assert any("b_loss, c_loss" in note for note in runs.notes)
    assert "no loss" in refused(tmp_path, metrics="run_id,a,b\na,,nan\nz,1,2\n")


# Files that are no tables


@pytest.mark.parametrize("argument", ["ratios", "metrics"])
def test_a_missing_file_and_a_folder_are_named(tmp_path, argument):
    paths = dict(zip(("ratios", "metrics"), write(tmp_path), strict=True))
    for path, what in ((tmp_path / "nowhere.csv", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(FileNotFoundError, match=f"`{argument}`: {path} {what}"):
            read_runs(**{**paths, argument: path})


@pytest.mark.parametrize("argument", ["ratios", "metrics"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds nothing"),
        ("\n \n", "holds nothing"),
        ("run_id,code,docs\n", "only a header"),
        ("run_id code docs\na 0.5 0.5\n", "single column"),
        ("run_id,code,docs\na,0.5\n", "line 2: 2 cells below a header of 3"),
        ("run_id,code,docs\na,0.5,0.5\nb,0.5,0.5,1\n", "line 3: 4 cells below a header of 3"),
        ("run_id,code,code\na,0.5,0.5\n", "same name: code"),
        ('run_id,code,docs\na,"0.5,0.5\n', "quotes"),
        (b"PK\x03\x04\xff\xfe\x00", "UTF-8"),
    ],
)
def test_what_is_no_table_is_refused_by_argument_and_file(tmp_path, argument, text, said):
    message = refused(tmp_path, **{argument: text})
    assert f"`{argument}`: {tmp_path / argument}.csv" in message and said in message
