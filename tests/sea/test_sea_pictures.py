import pytest
import torch

from hf_linear_attn.explain.sea_attention import attention_panels, draw_attention

from .hosts import make_ids, make_student, make_teacher


@pytest.mark.parametrize("host", ["bert", "llama"])
def test_panels_show_what_teacher_and_student_attend_to(host):
    teacher, student = make_teacher(host), make_student(host)
    ids, mask = make_ids(), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    panels = attention_panels(student, inputs, teacher, layer=1, sample=1)
    heads = student.config.num_attention_heads
    assert list(panels) == ["teacher", "estimate", "mask", "student"]
    for name, values in panels.items():
        assert values.shape == (heads, 14, 14)
        if name != "mask":
            rows = values.sum(-1)
            filled = panels["mask"].any(-1) if name == "student" else torch.ones_like(rows, dtype=torch.bool)
            torch.testing.assert_close(rows[filled], torch.ones_like(rows[filled]))
    assert (panels["student"][panels["mask"] == 0] == 0).all()
    teacher.set_attn_implementation("eager")
    hidden = teacher(ids[1:, 6:], output_attentions=True).attentions[1][0]
    torch.testing.assert_close(panels["teacher"], hidden, atol=1e-4, rtol=1e-3)
    alone = attention_panels(student, {"input_ids": ids[1:, 6:]}, layer=1)
    torch.testing.assert_close(panels["estimate"], alone["estimate"], atol=1e-4, rtol=1e-3)


def test_estimate_marks_the_kept_cells():
    student = make_student("llama", k=1)
    panels = attention_panels(student, {"input_ids": make_ids(1, 30)})
    kept, rest = (panels["estimate"][:, -1][panels["mask"][:, -1] == value] for value in (1, 0))
    assert kept.mean() > rest.mean()


def test_a_figure_has_a_row_for_each_head_and_refuses_what_is_not_there(tmp_path):
    teacher, student = make_teacher("llama"), make_student("llama", softmax_layers=[0])
    inputs = {"input_ids": make_ids(1, 9)}
    figure = draw_attention(student, inputs, teacher, layer=1, heads=(0, 3), tokens=list("abcdefghi"))
    assert len(figure.axes) == 8
    figure.savefig(tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 5000
    for arguments, message in (
        ({"layer": 0}, "no SEA layer; SEA layers of this model: .1."),
        ({"layer": 1, "heads": (4,)}, "heads 0 to 3"),
        ({"layer": 1, "tokens": ["a"]}, "9 real tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_attention(student, inputs, **arguments)
    with pytest.raises(ValueError, match="up to 2048"):
        attention_panels(student, {"input_ids": torch.zeros(1, 3000, dtype=torch.long)}, layer=1)
