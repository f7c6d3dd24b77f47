import io

import jax
import pytest

from seqeff.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_where_there_is_no_terminal() -> None:
    now = 0.0
    stream = io.StringIO()
    with Progress(100, 40, stream=stream, interval=10.0, clock=lambda: now) as progress:
        for step in range(41, 101):
            # the first compiles, and is no measure of what is left
            now += 1000.0 if step == 41 else 1.0
            progress.update(step, 2.5, 12345.0)
            if step == 60:
                progress.write("validation loss 2.2")
    assert stream.getvalue().splitlines() == [
        "step 41/100, loss 2.5000, 12.3k tokens/s",
        "step 51/100, loss 2.5000, 12.3k tokens/s, 00:49 left",
        "validation loss 2.2",
        "step 61/100, loss 2.5000, 12.3k tokens/s, 00:39 left",
        "step 71/100, loss 2.5000, 12.3k tokens/s, 00:29 left",
        "step 81/100, loss 2.5000, 12.3k tokens/s, 00:19 left",
        "step 91/100, loss 2.5000, 12.3k tokens/s, 00:09 left",
        "step 100/100, loss 2.5000, 12.3k tokens/s, 00:00 left",
    ]


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with Progress(10, 4, stream=stream) as progress:
        progress.update(5, 3.0, 900.0)
        progress.write("a sample")
        progress.update(10, 2.0, 900.0)
    shown = stream.getvalue()
    assert "a sample\n" in shown
    last = shown.rstrip().splitlines()[-1].split("\r")[-1]
    assert last.startswith("100%|")
    assert "10/10, loss 2.0000, 900 tokens/s, 00:00 left" in last


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_processes_are_silent(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Progress(10, stream=stream) as progress:
        progress.update(10, 2.0, 900.0)
        progress.write("a sample")
    assert stream.getvalue() == ""
