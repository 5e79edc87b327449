"""Has a model forgotten, does it leak, what has it kept: measured, and put into one document.

`metrics` is arithmetic on numbers; `scores` and `texts` run a model on given answers and let it
answer; `items` makes a record a row of them, `summary` the metrics of records, and `evaluation` the
document. `leaks` samples, `probes` asks again, `table` prints and `open_unlearning` writes that
framework's files.
"""
