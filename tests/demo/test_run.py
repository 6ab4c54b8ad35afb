"""What `make demo` says about its run."""

from tiltflow.demo.run import train_seconds


def test_a_half_written_last_line_counts_no_seconds(tmp_path) -> None:
    lines = ['{"step": 0, "seconds/epoch": 1.5}', '{"step": 0, "loss": 1.0}', '{"step": 1, "seconds/epoch": 2.0}', "{"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert train_seconds(tmp_path) == 3.5
