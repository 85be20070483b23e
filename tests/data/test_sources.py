import numpy as np
import pytest

from igpt.data import sources
from igpt.data.examples import ArrayImages
from igpt.errors import UserError
from tests.helpers import load_source, splits_of


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "mnist"}, "'mnist'; choose digits, npz:PATH, folder:PATH"),
        ({"source": "npz:"}, "data.source is 'npz:'; choose digits, npz:PATH"),
        ({"source": "digits:all"}, "data.source is 'digits:all'"),
        ({"source": "digits", "on_unreadable": "ignore"}, "data.on_unreadable is 'ignore'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        load_source(**fields)


def test_an_array_of_another_size_is_resized_or_refused(write_npz, write_openai):
    pictures = np.random.default_rng(0).integers(0, 256, (13, 9, 9), np.uint8)
    path = write_npz(images=pictures)
    settings = dict(source=f"npz:{path}", image_size=(3, 3), channels=1)
    with pytest.raises(UserError, match=r"9 x 9 with 1 channel.* 3 x 3 with 1\. .*'\(9,9\)'.*preprocess=shrink"):
        sources.open_source(settings)
    settings.update(preprocess="shrink", filter="box")
    source = sources.open_source(settings)
    assert source.train.images.shape == (9, 3, 3, 3) and source.channels == 1
    means = pictures.reshape(13, 3, 3, 3, 3).mean(axis=(2, 4))
    found = np.concatenate([split.images[:] for split in splits_of(source)])[..., 0]
    np.testing.assert_allclose(np.sort(found.ravel()), np.sort(np.round(means).ravel()), atol=1.0)
    settings.update(image_size=(9, 9))  # nothing to be done
    assert isinstance(sources.open_source(settings).train.images, ArrayImages)
    settings.update(preprocess="crop", crop=5, short_side=(6, 8), image_size=(9, 9))
    crops = sources.open_source(settings).train
    one, other = (crops.read(np.arange(9), np.full((9, 3), draw))[0] for draw in (0.0, 0.9))
    assert (one != other).any()
    settings["source"] = f"openai:{write_openai()}"
    with pytest.raises(UserError, match=r"5 x 5 with 3 channel.*data\.channels=3$"):
        sources.open_source(settings)
