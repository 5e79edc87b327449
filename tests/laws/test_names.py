"""Columns are called what a person would call them."""

import numpy as np
import pytest

from llmmix.laws.names import find_target
from tests.laws.test_tables import LOSSES, MIXTURES, named, read


def names(folder, domains, targets):
    shares = np.full((3, len(domains)), 1 / len(domains)).tolist()
    losses = np.full((3, len(targets)), 2.5).tolist()
    runs = read(folder, named(domains, shares), named(targets, losses))
    return runs.domains, runs.targets


@pytest.mark.parametrize(
    ("domains", "targets", "short_domains", "short_targets"),
    [
        ("the_pile_arxiv the_pile_cc", "arxiv_loss cc_loss", "arxiv cc", "arxiv cc"),
        # Cut as far as it goes, but not where domain and target would part
        ("gh_python gh_java", "gh_python_loss wiki_loss", "gh_python gh_java", "gh_python wiki"),
        ("web_en code_en", "web_en_loss code_en_loss", "web code", "web code"),
        ("a b", "eval/lm/x/CE-loss eval/lm/y/CE-loss", "a b", "x y"),
        ("m.a m.b", "eval/m.a eval/m.b", "a b", "a b"),
        # Not in the midst of a word
        ("preface preamble", "roseate_x oseate_x", "preface preamble", "roseate oseate"),
        # Nothing may be left empty, or without a letter
        ("a a_b", "x_loss x_x_loss", "a a_b", "x x_x"),
        ("data_1 data_2", "1_loss 2_loss", "data_1 data_2", "1_loss 2_loss"),
        # Of a single column, what is known
        ("web code", "metric/the_pile_web_val_loss", "web code", "web"),
        ("train_web", "web_val_loss", "web", "web"),
        ("web code", "my_web_score", "web code", "my_web_score"),
        ("web code", "loss", "web code", "loss"),
    ],
)
def test_names_are_shortened_alike(tmp_path, domains, targets, short_domains, short_targets):
    found = names(tmp_path, domains.split(), targets.split())
    assert found == (short_domains.split(), short_targets.split())


def test_names_of_fewer_targets_are_those_of_all(tmp_path):
    domains = [f"train_the_pile_{name}" for name in ("arxiv", "pubmed_a", "pubmed_b")]
    targets = [f"metric/the_pile_{name}_val_loss" for name in ("arxiv", "pubmed_a", "pubmed_b")]
    assert names(tmp_path, domains, targets)[1] == ["arxiv", "pubmed_a", "pubmed_b"]
    assert names(tmp_path, domains, targets[1:])[1] == ["pubmed_a", "pubmed_b"]
    assert names(tmp_path, domains, targets[2:])[1] == ["pubmed_b"]


def test_a_target_is_found_by_either_name(tmp_path):
    targets = ["corp_x/web_final_score", "corp_x/my_web_final_score"]
    runs = read(tmp_path, named(["web", "b"], MIXTURES), named(targets, LOSSES))
    assert runs.targets == ["web", "my_web"]
    for i, name in enumerate(targets):
        assert find_target(name, runs.targets) == find_target(runs.targets[i], runs.targets) == i
    # Names that went through a file have lost their columns, not what every table cuts
    assert find_target("metric/the_pile_pile_cc_val_loss", ["arxiv", "pile_cc"]) == 1
    assert find_target("arxiv", ["the_pile_arxiv_loss", "the_pile_github_loss"]) == 0


@pytest.mark.parametrize("name", ["nope", "", "code", "python_arxiv_loss"])
def test_a_target_that_is_unknown_or_ambiguous_lists_the_choices(name):
    targets = ["arxiv", "code_loss", "code_bpb"]
    with pytest.raises(
        ValueError, match=f"`objective`: no target {name!r}; .*arxiv, code_loss, code_bpb"
    ):
        find_target(name, targets)
