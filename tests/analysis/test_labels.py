import pytest

from sr4ir_dist.analysis.labels import parse_labelled


def test_labels_and_uris_in_order():
    words = ["L->T=runs/a", "s3://bucket/x=1/run/", "S = b"]
    assert list(parse_labelled(words).items()) == [
        ("L->T", "runs/a"),
        ("run", "s3://bucket/x=1/run/"),
        ("S", "b"),
    ]


@pytest.mark.parametrize("words", [["=a"], ["a="], [""], ["a=b", "a=c"]])
def test_words_that_name_nothing_or_one_thing_twice(words):
    with pytest.raises(ValueError, match="LABEL=URI|too"):
        parse_labelled(words)
