from __future__ import annotations

from pathlib import Path

from PIL import Image

from scripts.animate_captions import HOLD_SEC, save_animation


def test_each_caption_is_shown_from_its_time_on_and_the_file_is_small(tmp_path: Path) -> None:
    words = " ask not what your country can do for you" * 4  # more than two lines: the last are shown
    frames = [(0.0, "", ""), (0.5, "", " And so"), (1.0, " And so", ""), (1.5, " And so", words)]
    save_animation(frames, tmp_path / "live.gif", 2.0)
    animation = Image.open(tmp_path / "live.gif")
    shown, duration = [], 0.0
    for number in range(animation.n_frames):  # type: ignore[attr-defined]
        animation.seek(number)
        duration += animation.info["duration"] / 1000
        text = animation.convert("L").crop((0, 0, animation.width, animation.height - 6))
        shown.append((duration, text.getextrema()[0]))
    assert abs(duration - 2.0 - HOLD_SEC) < 0.05
    assert [darkest for at, darkest in shown if at <= 0.45] == [255] * 4
    assert all(100 < darkest < 200 for at, darkest in shown if 0.55 <= at <= 0.95)  # grey: it may change
    assert all(darkest < 60 for at, darkest in shown if 1.05 <= at <= 1.45)  # final
    assert (tmp_path / "live.gif").stat().st_size < 60_000
