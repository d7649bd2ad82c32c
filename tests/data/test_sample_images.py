import pytest
import torch
from process_groups import run_together

from lrf_lightning.data.sample_images import find_images
from lrf_lightning.distributed import current_processes


def batches():
    """Five batches of two images of one colour, of which number i is filled with i / 10."""
    images = torch.arange(10).view(10, 1, 1, 1).expand(10, 1, 4, 6) / 10
    return [(images[i : i + 2], torch.arange(i, i + 2)) for i in range(0, 10, 2)]


def test_images_are_found_by_the_number_of_the_sample():
    found = find_images(batches(), [3, 8])
    assert sorted(found) == [3, 8]
    for sample, image in found.items():
        assert (tuple(image.shape), image.dtype) == ((4, 6, 1), torch.uint8)
        assert set(image.unique().tolist()) == {round(25.5 * sample)}


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"labels": torch.zeros(2), "pixels": torch.zeros(2, 3, 4, 6)}, (4, 6, 3)),
        ((torch.zeros(2), [torch.zeros(2, 4, 6, 3, dtype=torch.uint8)]), (4, 6, 3)),
        ((torch.zeros(2, 5, 7), torch.zeros(2)), None),
        ((torch.zeros(2, 8, 4, 6), torch.zeros(2)), None),
    ],
)
def test_what_an_image_is(batch, expected):
    found = find_images([batch], [1])
    assert (tuple(found[1].shape) if found else None) == expected


def test_normalised_images_use_the_whole_range():
    image = find_images([torch.linspace(-2, 2, 12).view(1, 3, 2, 2)], [0])[0]
    assert (int(image.min()), int(image.max())) == (0, 255)


def test_batches_that_fail_give_no_images():
    def broken():
        yield torch.zeros(2, 3, 4, 4)
        raise OSError("disk gone")

    class Broken:
        def __iter__(self):
            return broken()

    assert find_images(Broken(), [0]) == {}
    assert find_images([torch.zeros(())], [0]) == {}


def _on_two(rank, world):
    processes = current_processes(torch.device("cpu"))
    own = batches()[processes.rank :: processes.size]
    return {sample: int(image[0, 0, 0]) for sample, image in find_images(own, [1, 2, 9], processes).items()}


def test_every_process_gets_the_images_of_all():
    expected = {sample: round(25.5 * sample) for sample in (1, 2, 9)}
    assert run_together(_on_two, 2) == [expected, expected]
