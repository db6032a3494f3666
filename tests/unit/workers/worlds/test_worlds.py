"""Worlds come from their seed alone, places look the same when seen again, and captions tell the truth."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from workers.model.backbones import find_backbone
from workers.model.text_encoder import tokenize
from workers.worlds.camera import DIRECTIONS, RANGE, CameraMove, plan_camera, read_move
from workers.worlds.captions import Scene, describe_move, write_caption, write_long_caption
from workers.worlds.clips import (
    PATH_BOX,
    Difficulty,
    Worlds,
    build_worlds,
    draw_clip,
    draw_move,
    draw_path,
    draw_spec,
    landmarks_of,
    render_clip,
    render_views,
)
from workers.worlds.terrain import FIRST_LAND_LEVEL
from workers.worlds.things import COLOURS, NOUNS

CPU = torch.device("cpu")
CALM = Difficulty(second_biome=0.0, max_movers=0, mover_share=0.0)


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    return build_worlds([draw_spec(3, CALM), draw_spec(4, CALM)], CPU)


def test_a_seed_is_a_world_alone_or_among_others(worlds: Worlds) -> None:
    alone = build_worlds([draw_spec(4, CALM)], CPU)
    assert torch.equal(alone.pictures_BCHW[0], worlds.pictures_BCHW[1])
    assert not torch.equal(worlds.pictures_BCHW[0], worlds.pictures_BCHW[1])


def test_a_clip_is_what_its_seed_says() -> None:
    one, same, other = draw_clip(11, 24), draw_clip(11, 24), draw_clip(12, 24)
    assert one.caption == same.caption
    assert np.array_equal(one.positions_F2, same.positions_F2)
    assert one.caption != other.caption


def test_a_place_seen_again_is_the_same_picture(worlds: Worlds) -> None:
    rng = np.random.default_rng(0)
    path = draw_path(CameraMove("out_and_back", 0, 2.0), 97, rng)
    frames = render_views(worlds.pictures_BCHW[:1], torch.from_numpy(path)[None])[0]
    assert np.array_equal(path[0], path[96])
    assert torch.equal(frames[0], frames[96])
    assert not torch.equal(frames[0], frames[48])


def test_views_are_cut_out_of_the_world(worlds: Worlds) -> None:
    view = render_views(worlds.pictures_BCHW, torch.tensor([[[100.0, 200.0]], [[5.0, 6.0]]]))
    assert torch.equal(view[0, 0], worlds.pictures_BCHW[0, :, 200:328, 100:228])
    assert torch.equal(view[1, 0], worlds.pictures_BCHW[1, :, 6:134, 5:133])


def test_landmarks_stand_on_land_in_their_colour(worlds: Worlds) -> None:
    spec = worlds.specs[0]
    marks = landmarks_of(spec, worlds.levels_BHW[0])
    assert marks
    assert all(worlds.levels_BHW[0][int(m.y), int(m.x)] >= FIRST_LAND_LEVEL for m in marks)
    assert all(2 * mark.radius >= 16 for mark in marks)
    assert {mark.species for mark in marks} <= set(spec.species)
    plain = next((m for m in marks if NOUNS[m.species.kind][0] in ("tent", "pine tree", "crystal", "rock")), None)
    if plain is not None:
        colour = torch.tensor(COLOURS[plain.species.colour][1]) / 127.5 - 1
        y, x, half = int(plain.y), int(plain.x), int(plain.radius)
        patch = worlds.pictures_BCHW[0, :, y - half : y + half, x - half : x + half].flatten(1).T
        assert (patch - colour).abs().amax(1).min() < 0.05


def test_captions_name_what_is_there() -> None:
    rng = np.random.default_rng(1)
    for seed in range(40):
        spec = draw_spec(seed)
        caption = write_caption(spec.scene, draw_move(rng), rng).lower()
        assert any(words in caption for words in spec.scene.grounds[0])
        for colour, _ in COLOURS:
            for _, noun in NOUNS:
                if f"{colour} {noun}" in caption:
                    assert (colour, noun) in spec.scene.things


def test_captions_are_various_in_text_and_length() -> None:
    rng = np.random.default_rng(2)
    scene = Scene((("desert",),), 1, (("red", "tents"), ("blue", "houses")), True, (("white", "birds"),))
    captions = {write_caption(scene, CameraMove("pan", 0, 2.0), rng) for _ in range(200)}
    lengths = [len(caption.split()) for caption in captions]
    assert len(captions) > 120
    assert min(lengths) <= 4
    assert max(lengths) > 40


def test_a_long_caption_speaks_of_the_view_in_one_sentence_of_many() -> None:
    backbone = find_backbone("longtake-world")
    for seed in range(40):
        rng = np.random.default_rng(seed)
        spec = draw_spec(seed, CALM)
        wanted = int(rng.integers(90, 330))
        caption = write_long_caption(spec.scene, CameraMove("pan", seed % 8, 2.0), rng, wanted)
        assert 100 <= int(tokenize([caption], backbone)[1]) <= 400
        about = [s for s in caption.split(". ") if any(word in s.lower() for word in spec.scene.grounds[0])]
        assert len(about) == 1
        heard = [read_move(caption, np.random.default_rng(draw)) for draw in (0, 1)]
        assert heard[0].direction == heard[1].direction == seed % 8


def test_texture_makes_the_ground_rough_and_moves_nothing_else() -> None:
    smooth, usual, rough = (draw_spec(3, dataclasses.replace(CALM, texture=texture)) for texture in (0.2, 1.0, 2.0))
    assert usual == draw_spec(3, CALM)
    borders = []
    for spec in (smooth, usual, rough):
        levels = build_worlds([spec], CPU).levels_BHW[0].int()
        borders.append((levels[:, 1:] != levels[:, :-1]).float().mean().item())
    assert borders[0] < 0.8 * borders[1] < 0.8 * borders[2]


@pytest.mark.parametrize("direction", range(8))
def test_words_of_a_caption_move_the_camera_as_they_say(direction: int) -> None:
    rng = np.random.default_rng(direction)
    for _ in range(8):
        move = CameraMove("pan", direction, 4.0)
        heard = read_move(f"green meadow, {describe_move(move, rng)}", rng)
        assert (heard.kind, heard.direction) == ("pan", direction)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("a red house, the camera holds still", "hold"),
        ("desert, out and back to the east", "out_and_back"),
        ("the camera loops around", "loop"),
        ("exploring the land", "wander"),
        ("hard cuts to other places and back", "cut"),
        ("the view pans left slowly", "pan"),
    ],
)
def test_a_planned_path_is_the_one_that_was_asked_for(prompt: str, kind: str) -> None:
    move = read_move(prompt, np.random.default_rng(0))
    path = plan_camera(prompt, 5, 96)
    assert move.kind == kind
    assert path.shape == (96, 2)
    assert path.dtype == np.float32
    assert np.array_equal(path, np.rint(path))
    assert path.min() >= 0
    assert path.max() <= RANGE
    assert np.array_equal(path, plan_camera(prompt, 5, 96))
    if kind == "hold":
        assert (path == path[0]).all()
    if kind == "out_and_back":
        assert path[48, 0] - path[0, 0] > 60
        assert abs(path[-1, 0] - path[0, 0]) <= 4
    if kind == "pan":
        assert (np.diff(path[:, 0]) == -1).all()
        assert (np.diff(path[:, 1]) == 0).all()


def test_a_silent_prompt_leaves_the_path_to_the_seed() -> None:
    paths = [plan_camera("猫", seed, 48) for seed in range(6)]
    assert len({path.tobytes() for path in paths}) > 3


def test_a_long_path_stays_in_its_range_and_keeps_its_pace() -> None:
    path = plan_camera("drifts north fast", 1, 4000)
    assert path.min() >= 0
    assert path.max() <= RANGE
    assert np.abs(np.diff(path, axis=0)).max() <= 4


def test_training_paths_stay_in_their_world() -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        path = draw_path(draw_move(rng), 400, rng)
        assert PATH_BOX[0] <= path.min()
        assert path.max() <= PATH_BOX[1]


def test_movers_pass_over_an_unmoving_ground() -> None:
    spec = next(spec for spec in map(draw_spec, range(100)) if spec.movers)
    spec = dataclasses.replace(
        spec, movers=tuple(dataclasses.replace(m, start=(370.0, 370.0)) for m in spec.movers[:1])
    )
    drawn = build_worlds([spec], CPU)
    at = torch.full((1, 2, 2), 300.0)
    frames = render_clip(drawn, at, torch.tensor([[0.0, 6.0]]))
    ground = render_views(drawn.pictures_BCHW, at)
    changed = (frames != ground).any(2).float().mean((2, 3))
    assert (changed > 0).all()
    assert (changed < 0.2).all()
    assert not torch.equal(frames[0, 0], frames[0, 1])


def test_directions_are_unit_steps_around_the_compass() -> None:
    assert len({vector for _, vector in DIRECTIONS}) == 8
