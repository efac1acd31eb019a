"""The marks that Transformers' test mixins carry, which `--strict-markers` would refuse."""

MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_training_test",
    "torch_compile_test",
)


def pytest_configure(config):
    """Register the marks."""
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: used by Transformers' mixins")
