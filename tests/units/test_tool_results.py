"""The result of a tool is no target, also where a template shows it only after the call, in the same turn."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_impl.text.conversation import Conversation
from tests.units.test_examples import marked, tokenizer_for

# As Gemma 4's: results follow their call within the model's turn, and only where there is a call.
IN_ONE_TURN = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% elif m.role == 'user' %}"
    "{{ '<turn>user\n' + m.content + '<end>\n' }}{% else %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<turn>model\n' }}{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ 'call ' + c.function.name + ';' }}{% endfor %}"
    "{% for n in range(loop.index, messages | length) if messages[n].role == 'tool' %}"
    "{{ '[INST]' + messages[n].content + '[/INST]' }}{% else %}{{ '[INST]' }}{% endfor %}"
    "{% else %}{{ m.content + '<end>\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<turn>model\n' }}{% endif %}"
)
CALL: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now"}}]}
ASKED = {"role": "user", "content": "time?"}
RESULT, REPLY = {"role": "tool", "content": "12:00"}, {"role": "assistant", "content": "Noon."}


@pytest.mark.parametrize("num_results", [1, 2])
@pytest.mark.parametrize("num_turns", [1, 2])  # with two, three or more replies are found together
def test_a_result_within_the_models_turn_is_no_target(num_results: int, num_turns: int) -> None:
    turn = (ASKED, CALL, *[RESULT] * num_results, REPLY)
    later = (ASKED, REPLY) * (num_turns - 1) * 2
    rest = "<turn>user\ntime?<end>\n<turn>model\n«Noon.<end>»\n" * (num_turns - 1) * 2
    text = marked(tokenizer_for(IN_ONE_TURN), Conversation((*turn, *later), None, "d:1"), "assistant")
    expected = "<turn>user\ntime?<end>\n<turn>model\n«call now;[INST]»" + "12:00[/INST][INST]" * (
        num_results - 1
    )
    assert text + "\n" == f"{expected}12:00[/INST]«Noon.<end>»\n{rest}"
