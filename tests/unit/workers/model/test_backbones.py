"""Sizes and the arithmetic between pictures, latent frames and chunks."""

from dataclasses import replace

import pytest

from workers.errors import ConfigUnsupported
from workers.model.backbones import BACKBONES, HUNYUAN_VIDEO, find_backbone


def test_published_token_counts_and_picture_counts() -> None:
    wan = find_backbone("wan2.1-t2v-1.3b")
    assert wan.tokens_per_latent_frame(832, 480) == 1560
    assert find_backbone("wan2.1-i2v-14b").tokens_per_latent_frame(640, 352) == 880
    assert [wan.num_video_frames(n) for n in (0, 1, 3, 21, 126)] == [0, 1, 9, 81, 501]
    assert [find_backbone("longtake-world").num_video_frames(n) for n in (0, 1, 3, 30)] == [0, 4, 12, 120]


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_chunks_and_frames_agree(name: str) -> None:
    backbone = BACKBONES[name]
    step = backbone.chunk_latent_frames
    for frames in range(1, 60):
        chunks = backbone.num_chunks(frames)
        assert backbone.num_video_frames(chunks * step) >= frames > backbone.num_video_frames((chunks - 1) * step)
        assert backbone.chunk_of_frame(frames - 1) == chunks - 1


def test_clips_overlap_by_one_picture() -> None:
    longvie = find_backbone("longvie2-14b")
    assert [longvie.num_chunks(n) for n in (1, 81, 82, 161, 162, 401)] == [1, 1, 2, 2, 3, 5]
    assert [longvie.chunk_of_frame(n) for n in (0, 80, 81, 160, 161)] == [0, 0, 1, 1, 2]
    assert longvie.num_video_frames(longvie.chunk_latent_frames) == 81
    assert longvie.chunk_latent_frames * longvie.tokens_per_latent_frame(640, 352) == 18_480


def test_a_benchmark_geometry_counts_the_tokens_of_one_call() -> None:
    assert HUNYUAN_VIDEO.num_tokens == 33 * 45 * 80 + 256
    assert sum(HUNYUAN_VIDEO.rope_channels) == HUNYUAN_VIDEO.head_dim


def test_a_picture_that_is_not_whole_tokens_is_refused_with_its_size() -> None:
    with pytest.raises(ConfigUnsupported, match="128x136"):
        find_backbone("longtake-world").latent_size(128, 136)


def test_the_model_of_benches_differs_from_the_published_one_in_its_text_encoder_alone() -> None:
    bench, wan = find_backbone("wan-1.3b-test"), find_backbone("wan2.1-t2v-1.3b")
    assert replace(bench, name=wan.name, umt5=wan.umt5, native=None) == wan


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigUnsupported, match="longtake-world"):
        find_backbone("longtake-wold")
