import logging

from llmmix.processes import main_process_says, warn_once


def test_alone_a_process_speaks_for_itself(caplog):
    assert main_process_says({"kept": ["a"]}) == {"kept": ["a"]}
    with caplog.at_level(logging.WARNING):
        warn_once("said")
    assert caplog.messages == ["said"]
