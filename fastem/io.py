from __future__ import annotations
import io as _io, os, tarfile, tempfile
from contextlib import contextmanager
from pathlib import Path
import numpy as np
from PIL import Image
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}
def resize(image, scale):
    h, w = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((max(1, round(w*scale)), max(1, round(h*scale))), Image.LANCZOS))
@contextmanager
def atomic_write(path):
    path = Path(path)
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=".tmp")
    try:
        with os.fdopen(fd, "wb") as f:
            yield f
            f.flush(); os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        if os.path.exists(tmp): os.unlink(tmp)
        raise
def iter_training_images(paths):
    for path in paths:
        path = Path(path)
        if path.is_dir():
            yield from iter_training_images(sorted(p for p in path.iterdir() if p.suffix in (IMAGE_SUFFIXES | {".tar"}) or p.is_dir()))
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for m in tar:
                    if m.isfile() and Path(m.name).suffix.lower() in IMAGE_SUFFIXES:
                        yield np.asarray(Image.open(_io.BytesIO(tar.extractfile(m).read())).convert("RGB"))
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield np.asarray(Image.open(path).convert("RGB"))
