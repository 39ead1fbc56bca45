"""Where training pictures come from, which of them validate, and that none is a picture of the test set."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastem import io
from fastem.training.data import HELD_OUT, fingerprint, hold_out, read_pictures, validation_split, without
from fastem.training.image_prior import read_data


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(8, 9, 3, seed=seed) if pixels is None else pixels).save(path)
    return path


def names(*paths):
    return [name for name, _ in read_pictures(paths)]


# ---------------------------------------------------------------------------------------------------- reading


def test_folders_and_shards(tmp_path):
    data = tmp_path / "data"
    save(data / "b.PNG")
    save(data / "sub" / "gray.png", noise(8, 9))
    (data / "broken.png").write_bytes(b"nothing")
    (data / "notes.txt").write_text("no picture")
    with tarfile.open(data / "c.tar", "w") as shard:
        shard.add(data / "b.PNG", arcname="inside.png")
    with pytest.warns(UserWarning, match="broken.png is not used"):
        pictures = dict(read_pictures([data]))
    assert list(pictures) == ["b.PNG", "inside.png", "sub/gray.png"]
    np.testing.assert_array_equal(pictures["b.PNG"], pictures["inside.png"])
    np.testing.assert_array_equal(pictures["sub/gray.png"], np.repeat(noise(8, 9)[..., None], 3, axis=2))


def test_webdataset_shard(tmp_path):
    """Samples of several files: the pictures count, labels and captions do not."""
    photo = save(tmp_path / "photo.png")
    (tmp_path / "label").write_text("7")
    with tarfile.open(tmp_path / "shard-000000.tar", "w") as shard:
        for key in ("000/0001", "000/0002"):
            shard.add(tmp_path / "label", arcname=f"{key}.cls")
            shard.add(tmp_path / "label", arcname=f"{key}.json")
            shard.add(photo, arcname=f"{key}.png")
    assert names(tmp_path / "shard-000000.tar") == ["000/0001.png", "000/0002.png"]


def test_damaged_shard_is_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.add(save(tmp_path / "photo.png", noise(64, 64, 3)), arcname="photo.png")
    data = (tmp_path / "a.tar").read_bytes()
    for broken in (data[:3000], b"no archive" * 100, b""):
        (tmp_path / "a.tar").write_bytes(broken)
        with pytest.raises(ValueError, match="a.tar: not a whole tar archive"):
            list(read_pictures([tmp_path / "a.tar"]))


def test_image_folder_with_splits_and_classes(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "validation/cat/2.png", "test/cat/3.png"):
        save(tmp_path / name)
    assert names(tmp_path) == ["cat/1.png", "dog/1.png"]
    assert validation_split([tmp_path]) == [tmp_path / "validation"]
    assert names(*validation_split([tmp_path])) == ["cat/2.png"]


def test_metadata_names_the_pictures(tmp_path):
    for name in ("a.png", "sub/b.png", "c.png", "left_out.png"):
        save(tmp_path / "train" / name)
    lines = [{"file_name": "sub/b.png", "text": "x"}, {"file_name": "a.png"}, {"file_name": "a.png", "text": "y"}]
    lines += [{"target_file_name": "c.png"}, {"file_name": "missing.png"}]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    with pytest.warns(UserWarning, match="missing.png is not used"):
        assert names(tmp_path) == ["sub/b.png", "a.png", "c.png"]


@pytest.mark.parametrize(
    "line, message",
    [("{", 'not a JSON object with a "file_name"'), ("[1]", "not a JSON object"), ('{"text": "x"}', 'no "file_name"'),
     ('{"file_name": 3}', "not a JSON object"), ('{"file_name": "a/../../b.png"}', "outside its folder"),
     ('{"file_name": "/b.png"}', "outside its folder")],
    ids=str,
)  # fmt: skip
def test_metadata_that_makes_no_sense(tmp_path, line, message):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n' + line)
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"metadata.jsonl, line 2: .*{message}"):
        names(tmp_path)


# -------------------------------------------------------------------------------------------------- held out


def test_pictures_are_held_out_by_name():
    pictures = [(f"{i}.png", noise(1, 1, 3)) for i in range(2000)]
    training, held_out = hold_out(pictures)
    assert len(training) + len(held_out) == 2000 and 0.5 < len(held_out) / 2000 / HELD_OUT < 1.5
    assert not {name for name, _ in training} & {name for name, _ in held_out}
    few, chosen = hold_out(pictures[:500])
    assert {name for name, _ in chosen} == {name for name, _ in held_out[: len(chosen)]}  # whatever else is there
    assert [len(part) for part in hold_out([("a", 0), ("b", 0)])] == [1, 1]
    assert hold_out(pictures[:1]) == (pictures[:1], pictures[:1])


def test_given_validation_pictures_do_not_train(tmp_path):
    for i in range(4):
        save(tmp_path / "photos" / f"{i}.png", seed=i)
    save(tmp_path / "own" / "other_name.bmp", seed=2)
    with pytest.warns(UserWarning, match="1 pictures validate and are not used for training"):
        training, held_out = read_data([tmp_path / "photos"], [tmp_path / "own"])
    assert [name for name, _ in training] == ["0.png", "1.png", "3.png"]
    assert [name for name, _ in held_out] == ["other_name.bmp"]
    assert without(training, []) == training


def test_no_pictures_is_told(tmp_path):
    with pytest.raises(ValueError, match="no pictures in .*give folders of images"):
        read_data([tmp_path], None)
    save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures to validate on in"):
        read_data([tmp_path], [tmp_path / "empty"])


# --------------------------------------------------------------------------------- training and test data apart

NEAR = 5  # bits of 64 in which the hashes of copies of one photograph may differ
FLAT = 6  # grey levels; pictures of less contrast have hashes that say little


def difference_hash(pixels, mirrored=False):
    """64 bits: whether each of 8 x 8 cells is brighter than its right neighbour. Scale and compression change few."""
    gray = Image.fromarray(pixels[:, ::-1] if mirrored else pixels).convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(gray, dtype=int)
    return np.packbits(cells[:, 1:] < cells[:, :-1])


def copies(training, test):
    """`(training name, test name)` of pictures that are equal, or look like the same photograph, mirrored or not."""
    equal = {fingerprint(pixels): name for name, pixels in training}
    found = [(equal[key], name) for name, pixels in test if (key := fingerprint(pixels)) in equal]
    hashes = np.stack([difference_hash(pixels) for _, pixels in training])
    for name, pixels in test:
        for mirrored in (False, True):
            distance = np.unpackbits(hashes ^ difference_hash(pixels, mirrored), axis=1).sum(axis=1)
            found += [(training[i][0], name) for i in np.flatnonzero(distance <= NEAR)]
    return found


def photo_like(seed):
    coarse = Image.fromarray(noise(12, 16, 3, seed=seed))
    return np.asarray(coarse.resize((160, 120), Image.Resampling.BICUBIC))


def test_copies_are_found_and_others_are_not(tmp_path):
    photos = [(f"{i}", photo_like(i)) for i in range(40)]
    save(tmp_path / "copy.jpg", photos[3][1])
    small = io.resize(io.read_image(tmp_path / "copy.jpg").pixels, 0.5)
    assert copies(photos, [("copy", small)]) == [("3", "copy")]
    assert copies(photos, [("mirror", small[:, ::-1])]) == [("3", "mirror")]
    assert ("5", "same") in copies(photos, [("same", photos[5][1])])
    assert copies(photos[:20], photos[20:]) == []


def data_folder() -> Path:
    """Training and test data that are not part of the package, where they are."""
    folder = Path(os.environ.get("FASTEM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        pytest.skip("FASTEM_DATA names no folder with train/ and test/")
    return folder


@pytest.mark.filterwarnings("ignore:.*is not used for training")
def test_no_test_picture_is_in_the_training_pack():
    folder = data_folder()
    training = list(read_pictures(sorted((folder / "train").glob("*.tar"))))
    test = list(read_pictures(p for p in sorted((folder / "test").iterdir()) if p.is_dir() and p.name != "kernels"))
    assert len(training) > 1000 and len(test) > 100
    assert copies(training, test) == []
