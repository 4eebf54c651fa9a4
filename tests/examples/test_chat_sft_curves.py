"""What a run writes down and draws, from results as the SDK hands them out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tinker
from answers import show_answers
from chat_sft import masked_nll
from curves import StepMetrics, append_metrics, compare_runs, plot_curves, read_metrics
from render import RenderedChat, to_datum
from rich.console import Console


def output(*logprobs: list[float]) -> tinker.ForwardBackwardOutput:
    return tinker.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=[{"logprobs": tinker.TensorData.from_numpy(np.array(row, np.float32))} for row in logprobs],
        metrics={"loss:sum": 0.0},
    )


def history(last_nll: float) -> list[StepMetrics]:
    return [
        StepMetrics(0, None, 3.0, 0, 900.0, 0.0, 1.5),
        *(StepMetrics(i, 3.0 - i / 20, None, 640, 400.0, 1e-4, 1.5 + i) for i in range(1, 20)),
        StepMetrics(20, 2.0, last_nll, 640, 400.0, 1e-4, 22.0),
    ]


def test_masked_nll_is_the_mean_over_weighted_targets_of_all_data() -> None:
    data = [to_datum(RenderedChat([5, 6, 7], [0.0, 0.0, 1.0]), 9), to_datum(RenderedChat([5, 6, 7], [0, 1.0, 1.0]), 9)]

    nll = masked_nll(output([-9.0, -1.0], [-2.0, -3.0]), data)

    assert nll == pytest.approx((1.0 + 2.0 + 3.0) / 3)


def test_masked_nll_refuses_a_result_of_another_length() -> None:
    data = [to_datum(RenderedChat([5, 6, 7], [0.0, 0.0, 1.0]), 9)]

    with pytest.raises(ValueError, match="shorter"):
        masked_nll(output(), data)


def test_metrics_come_back_as_they_were_written(tmp_path: Path) -> None:
    for row in history(1.75):
        append_metrics(tmp_path, row)

    assert read_metrics(tmp_path) == history(1.75)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[0] == (
        '{"step": 0, "train_nll": null, "test_nll": 3.0, "num_tokens": 0, "tokens_per_s": 900.0, '
        '"learning_rate": 0.0, "elapsed_s": 1.5}'
    )


def test_curves_are_drawn_from_a_whole_run_and_from_one_stopped_at_once(tmp_path: Path) -> None:
    from PIL import Image

    plot_curves(history(1.75), tmp_path / "curves.png", "a run")
    plot_curves(history(1.75)[:1], tmp_path / "stopped.png", "a run stopped at step 0")

    with Image.open(tmp_path / "curves.png") as whole, Image.open(tmp_path / "stopped.png") as stopped:
        assert whole.size == stopped.size == (1200, 750)
        assert len(whole.convert("RGB").getcolors(maxcolors=2**20) or []) > 3


def test_runs_are_compared_best_first(tmp_path: Path) -> None:
    for name, last in (("slow", 2.9), ("good", 1.5)):
        (tmp_path / name).mkdir()
        for row in history(last):
            append_metrics(tmp_path / name, row)
    console = Console(record=True, width=120)

    compare_runs([tmp_path / "slow", tmp_path / "good"], console)

    text = console.export_text()
    assert text.index("good") < text.index("slow")
    assert f"{100 * (1.5 / 3.0 - 1):+.1f} %" in text
    assert (tmp_path / "comparison.png").is_file()


def test_answers_are_shown_side_by_side_and_kept_in_a_file(tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi [bold]?"}]

    show_answers(console, [prompt], ["Hello."], ["Ahoy [1]."], tmp_path / "answers.md")  # type: ignore[list-item]

    assert "Hi [bold]?" in console.export_text()
    kept = (tmp_path / "answers.md").read_text()
    assert kept.index("Be brief.") < kept.index("**Before**\n\nHello.") < kept.index("**After**\n\nAhoy [1].")
