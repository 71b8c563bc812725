import numpy as np
import pytest

from alignprop_jax.config import load_config
from alignprop_jax.errors import UserError
from alignprop_jax.runs.experiment import load_experiment, load_reward, make_keys


@pytest.fixture(scope="module")
def loaded(nano_config):
    config = load_config(str(nano_config))
    (nano_config.parent / "repeated.txt").write_text("a dog\na cow\na dog\n")
    config.prompts = str(nano_config.parent / "repeated.txt")
    config.negative_prompt = "bad"
    return load_experiment(config)


def test_prompts_are_encoded_as_transformers_does(loaded, nano_config):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = nano_config.parent / "model"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")

    def expected(prompts):
        ids = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
        with torch.no_grad():
            return encoder(ids.input_ids)[0].numpy()

    train, unseen = loaded.splits["train"], loaded.splits["unseen"]
    assert train.prompts == ["a dog", "a cow", "a dog"] and unseen.prompts == ["a cow"]
    np.testing.assert_allclose(
        train.table.encoded.hidden_states, expected(train.prompts), atol=1e-4
    )
    np.testing.assert_allclose(
        unseen.table.encoded.hidden_states, expected(unseen.prompts), atol=1e-4
    )
    np.testing.assert_allclose(train.table.negative.hidden_states, expected(["bad"]), atol=1e-4)
    np.testing.assert_array_equal(
        unseen.table.negative.hidden_states, train.table.negative.hidden_states
    )


def test_reward_inputs_are_the_models_tokens(loaded):
    inputs = np.asarray(loaded.splits["train"].table.reward_inputs)
    assert inputs.shape == (3, 16) and inputs.dtype == np.int32
    np.testing.assert_array_equal(inputs[0], inputs[2])
    assert not np.array_equal(inputs[0], inputs[1])


def test_the_text_encoder_is_not_kept(loaded):
    assert loaded.params.keys() == {"unet", "vae"}
    assert loaded.generator.sample_shape == (8, 8, 3)


def test_keys_of_a_seed_differ():
    draws = {tuple(np.asarray(key._base_array)) for seed in (0, 1) for key in make_keys(seed)}
    assert len(draws) == 6


@pytest.mark.parametrize(
    "name, message",
    [
        ("{folder}/rewards.py:one_number", "rewards.py:one_number' must return one score an image"),
        ("{folder}/rewards.py:absent", "has no function 'absent'"),
        ("", "reward '' not found"),
    ],
)
def test_a_further_reward_is_checked_before_anything_is_sampled(loaded, nano_config, name, message):
    config = load_config(str(nano_config))
    with pytest.raises(UserError, match=message):
        load_reward(config, name.format(folder=nano_config.parent), loaded)
    # It is there to be watched, and needs no gradient.
    load_reward(config, f"{nano_config.parent}/rewards.py:in_bytes", loaded)
