"""The table of what experts cost in the step."""

from tove_jax.bench.online import Row, table


def test_table():
    rows = [Row((), 10.0, 2.0, 1.5, 0.0), Row(("clip", "hed"), 25.0, 1.0, 0.5, 80.0)]
    assert table(rows).splitlines()[2:] == [
        "| none | 10.0 | 1.00 | 2.0 | 1.50 | 0.0 |",
        "| clip, hed | 25.0 | 2.50 | 1.0 | 0.50 | 80.0 |",
    ]
