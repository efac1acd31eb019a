"""What travels with a checkpoint of DANet."""

from danet.models import decoder, encoder


def test_an_encoder_carries_no_code_of_generation(tmp_path):
    """Its checkpoint has the body and the heads of encoders: no causal language model, no generate(), no CUDA graphs."""
    files = {}
    for name, model in (("encoder", encoder("learned g relu")), ("decoder", decoder("g"))):
        model.save_pretrained(tmp_path / name)
        files[name] = {path.stem for path in (tmp_path / name).rglob("*.py")}
    generation = {
        "modeling_danet_causal",
        "shared_causal_lm",
        "shared_states_generation",
        "shared_kernels_decoding_graph",
    }
    assert generation <= files["decoder"]
    assert not generation & files["encoder"]
