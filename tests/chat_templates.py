"""Chat templates that do what those of models do."""

# ChatML, as Qwen's
PLAIN = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# as Mistral's: no system's message, turns in order, spaces that are cut
STRICT = """{{ bos_token }}{% for message in messages %}
{% if message['role'] not in ['user', 'assistant'] %}
{{ raise_exception('only users and assistants') }}
{% endif %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must take turns') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}
{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}
{% endif %}
{% endfor %}"""

# Jinja beyond its core
RICH = """{% set names = namespace(count=0) %}{% for message in messages %}
{% if message.content == 'skip' %}{% continue %}{% endif %}
{% set names.count = names.count + 1 %}
{{ names.count }}: {{ message | tojson }} {{ strftime_now('%%') }}
{% if names.count == 9 %}{% break %}{% endif %}
{% endfor %}{% if tools is none and not undefined_name %}go{% endif %}"""

TEMPLATES = {"plain": PLAIN, "strict": STRICT, "rich": RICH}


def turns(*contents, system=None):
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant")
    chat = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return chat if system is None else [{"role": "system", "content": system}, *chat]
