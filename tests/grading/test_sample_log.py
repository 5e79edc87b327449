from llmmix.grading import SampleLog


def test_a_log_reads_the_first_of_two(tmp_path):
    log = SampleLog(tmp_path, {"seed": 0})
    log.append([{"problem": 0, "sample": 0, "x": 1}])
    log.append([{"problem": 0, "sample": 0, "x": 2}, {"problem": 0, "sample": 1, "x": 3}])
    log.append([])
    assert [r["x"] for r in SampleLog(tmp_path, {"seed": 0}).read()] == [1, 3]
    log.replace([{"problem": 0, "sample": 0, "x": 5}])
    assert [r["x"] for r in log.read()] == [5]
