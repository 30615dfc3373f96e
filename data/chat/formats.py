"""Well-known chat formats as jinja2 programs, for checkpoints without one of their own."""

# The newline after a {% block %} is not part of the text, nor is the space before one at the start of a line.
TEMPLATES = {
    # Meta's Llama 2 chat: the system message sits inside the first user message.
    "llama2": """\
{% set system = messages[0].content if messages[0].role == 'system' else none %}
{% for message in (messages if system is none else messages[1:]) %}
{% if message.role != ('assistant' if loop.index0 % 2 else 'user') %}
{{ raise_exception('the llama2 format wants user and assistant messages in turn, after at most one system message') }}
{% endif %}
{% if message.role == 'assistant' %}
{{ ' ' ~ message.content.strip() ~ ' ' ~ eos_token }}
{%- elif loop.first and system is not none %}
{{ bos_token ~ '[INST] ' ~ ('<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' ~ message.content).strip() ~ ' [/INST]' }}
{%- else %}
{{ bos_token ~ '[INST] ' ~ message.content.strip() ~ ' [/INST]' }}
{%- endif %}
{% endfor %}
""",
    "llama3": """\
{{ bos_token }}
{%- for message in messages %}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content.strip() }}<|eot_id|>
{%- endfor %}
{% if add_generation_prompt %}
<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}
{%- endif %}
""",
    # Nothing stands before the first turn, except BOS for a tokenizer whose model expects one before every text.
    "chatml": """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
    # Vicuna v1.1 to v1.5 (FastChat): plain words, one space after a question, EOS after an answer.
    "vicuna": """\
{{ bos_token }}
{%- if messages[0].role == 'system' %}
{{ messages[0].content }}
{%- else %}
A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions.
{%- endif %}
{{ ' ' }}
{%- for message in messages %}
{% if message.role == 'user' %}
USER: {{ message.content }}{{ ' ' }}
{%- elif message.role == 'assistant' %}
ASSISTANT: {{ message.content }}{{ eos_token }}
{%- elif not loop.first %}
{{ raise_exception('the vicuna format has user and assistant messages, after at most one system message') }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
ASSISTANT:
{%- endif %}
""",
}
# LLaVA 1.5 was trained on Vicuna's, with the images of a message before its words.
TEMPLATES["llava"] = """\
{% macro words(message) %}
{% if message.content is string %}
{{ message.content }}
{%- else %}
{% for part in message.content if part.type == 'image' %}
<image>{{ '\\n' }}
{%- endfor %}
{% for part in message.content if part.type == 'text' %}
{{ part.text }}
{%- endfor %}
{% endif %}
{% endmacro %}
"""
TEMPLATES["llava"] += (
    TEMPLATES["vicuna"]
    .replace("message.content", "words(message)")
    .replace("messages[0].content", "words(messages[0])")
)
