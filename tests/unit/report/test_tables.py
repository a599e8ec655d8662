"""Tables of the page (megalite/report/tables.py)."""

from megalite.report.tables import table, wide


def test_a_table_has_a_header_and_rows() -> None:
    found = table(["a", "b"], [["1", "<b>2</b>"], ["3", "4"]], long={1})
    assert found == (
        '<table class="figures"><tr><th>a</th><th>b</th></tr>'
        "<tr><td>1</td><td class=long><b>2</b></td></tr><tr><td>3</td><td class=long>4</td></tr></table>"
    )
    assert table(["a"], []) == '<table class="figures"><tr><th>a</th></tr></table>'
    assert wide("x") == '<div class="wide">x</div>'
