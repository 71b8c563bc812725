"""The CLIP towers against transformers, random weights."""

import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.models.clip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)
from tests import torch_pipeline
from tests.parity import assert_parity


def token_ids(batch, eos):
    """Texts of several lengths, closed by the end token and then padded with it."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, torch_pipeline.VOCAB_SIZE - 2, (batch, torch_pipeline.MAX_LENGTH))
    for row, length in enumerate(rng.permutation(torch_pipeline.MAX_LENGTH)[:batch]):
        ids[row, length:] = eos
    return ids


# Two activations, and both rules for where the text ends: the first end token ("tiny", "sd2"), or
# the highest id where the file says 2 ("odd").
@pytest.mark.parametrize("name", torch_pipeline.TEXTS)
def test_text_tower_equals_transformers(name):
    peer = torch_pipeline.build_text_encoder(name)
    model = CLIPTextModel(CLIPTextConfig.from_dict(peer.config.to_dict()))

    def peer_apply(ids):
        out = peer(ids, output_hidden_states=True)
        return out.last_hidden_state, out.hidden_states[-2], out.pooler_output

    assert_parity(
        model,
        peer,
        lambda params, ids: tuple(model.apply({"params": params}, ids)),
        peer_apply,
        (token_ids(3, eos=torch_pipeline.VOCAB_SIZE - 1),),
    )


def test_second_text_encoder_of_stable_diffusion_xl_equals_transformers():
    transformers = torch_pipeline.transformers
    peer = transformers.CLIPTextModelWithProjection(torch_pipeline.text_config("sd2"))
    torch_pipeline.randomize_parameters(peer)
    model = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(peer.config.to_dict()))

    def peer_apply(ids):
        out = peer(ids, output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds

    def apply(params, ids):
        states = model.apply({"params": params}, ids)
        return states.penultimate, states.pooled

    ids = token_ids(3, eos=torch_pipeline.VOCAB_SIZE - 1)
    assert_parity(model, peer, apply, peer_apply, (ids,))


def test_end_of_text_is_the_first_of_its_tokens_and_not_the_highest_id():
    peer = torch_pipeline.build_text_encoder("tiny", eos_token_id=5)
    model = CLIPTextModel(CLIPTextConfig.from_dict(peer.config.to_dict()))
    ids = np.array([[7, 80, 5, 9, 5, 5], [5, 84, 85, 3, 2, 1]])

    assert_parity(
        model,
        peer,
        lambda params, ids: model.apply({"params": params}, ids).pooled,
        lambda ids: peer(ids).pooler_output,
        (ids,),
    )


@pytest.mark.parametrize("name", ["tiny", "sd2"])
def test_both_towers_equal_transformers(name):
    peer = torch_pipeline.build_clip(name)
    model = CLIPModel(CLIPConfig.from_dict(peer.config.to_dict()))
    images = np.random.default_rng(2).standard_normal((2, 3, 24, 24)).astype(np.float32)

    def apply(params, ids, images):
        variables = {"params": params}
        text = model.apply(variables, ids, method="get_text_features")
        image = model.apply(variables, images, method="get_image_features")
        return text, image, model.apply(variables, ids, images)

    def peer_apply(ids, images):
        text = peer.text_projection(peer.text_model(ids).pooler_output)
        image = peer.visual_projection(peer.vision_model(images).pooler_output)
        return text, image, peer(input_ids=ids, pixel_values=images).logits_per_image

    assert_parity(
        model,
        peer,
        apply,
        peer_apply,
        (token_ids(3, eos=torch_pipeline.VOCAB_SIZE - 1), images),
    )


def test_unknown_activation_is_refused_by_name():
    with pytest.raises(
        UserError, match='hidden_act="relu" is not supported; it must be "quick_gelu" or "gelu"'
    ):
        CLIPTextConfig.from_dict({"hidden_act": "relu"})
