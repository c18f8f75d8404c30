"""Templates and pictures of strangers take a bounded amount of memory, and released ones are within the bounds."""

import io
import resource
import struct
import subprocess
import sys
import zlib

import pytest
from transformers import AutoTokenizer

from joint_train.data import images, render
from joint_train.errors import DataError

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
GREEDY = {
    "doubling": "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(28) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x | length }}",
    "padding": "{{ '%1999999999d' | format(1) | length }}",
    "a list": "{{ ([0] * 400000000) | length }}",
}


def peak() -> int:
    """Most memory that this process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def template(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if text is not None:
        tokenizer.chat_template = text
    return render.Template(tokenizer, {})


@pytest.mark.parametrize("name", GREEDY)
def test_a_template_that_takes_gigabytes_is_refused(starter_dir, name):
    before, most = resource.getrlimit(resource.RLIMIT_AS), peak()
    with pytest.raises(DataError, match="takes more than 1024 MiB of memory|refuses it: OverflowError"):
        template(starter_dir / "base", GREEDY[name]).render(MESSAGES)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert peak() < most + 3 * 2**30 / 2


def test_a_long_conversation_is_within_the_limit(starter_dir):
    long = [{"role": role, "content": "word " * 200_000} for role in ("user", "assistant")]
    assert len(template(starter_dir / "base", None).render(long)) > 2_000_000


def huge_png(width, height):
    """A picture whose file is tiny, of one bit a pixel and all black."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(1 + -(-width // 8)) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def processor(monkeypatch):
    """In place of the model's, which isn't needed to refuse a picture."""
    taken = []
    monkeypatch.setattr(images, "_processor", lambda folder: lambda images, **_: taken.append(images[0].size) or {})
    return taken


def test_pictures_beyond_the_limit_are_refused_before_they_are_decoded(processor):
    picture, most = huge_png(13_000, 13_000), peak()
    assert len(picture) < 100_000
    with pytest.raises(DataError, match=r"has 13000 x 13000 pixels, and at most 150,000,000 are decoded"):
        images.pixels(picture, "")
    assert peak() < most + 2**28
    assert processor == []


def test_a_picture_of_12000_by_12000_is_read(processor, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1_500_000)
    images.pixels(huge_png(1200, 1200), "")
    assert processor == [(1200, 1200)] and 12_000**2 <= 150_000_000


def test_formats_that_run_programs_are_not_read(processor, tmp_path):
    """Pillow hands PostScript to Ghostscript."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")
    with pytest.raises(DataError, match="can't be read: UnidentifiedImageError"):
        images.pixels(buffer.getvalue(), "")
    assert processor == []


@pytest.mark.slow
def test_a_real_picture_of_12000_by_12000_takes_less_than_3_gb():
    program = (
        "import sys, resource; sys.path.insert(0, 'tests/data')\n"
        "from test_data_limits import huge_png, images\n"
        "images._processor = lambda folder: lambda images, **_: {}\n"
        "images.pixels(huge_png(12000, 12000), '')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert int(found.stdout) < 3 * 2**20
