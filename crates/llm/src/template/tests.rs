//! What well-known templates draw, as Jinja2 draws them with Hugging Face's settings.

use super::*;

const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const LLAMA_3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

const GEMMA: &str = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}";

const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";

const QWEN_3: &str = "{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == \"user\" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == \"user\") or (message.role == \"system\" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == \"assistant\" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {{- message.tool_calls | tojson }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}";

const PHI_3: &str = "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}";

fn template(source: &str) -> ChatTemplate {
    ChatTemplate { source: source.into(), bos: "<s>".into(), eos: "</s>".into() }
}

fn turns(turns: &[(Role, &str)]) -> Vec<(Role, String)> {
    turns.iter().map(|(role, words)| (*role, words.to_string())).collect()
}

/// What a template draws behind the turn `after`, words and markup alike.
fn drawn(source: &str, of: &[(Role, &str)], after: usize) -> Result<String, TemplateError> {
    let pieces = template(source).render(&turns(of), after)?;
    let text = pieces.into_iter().map(|piece| match piece {
        Piece::Markup(text) | Piece::Words(text) => text,
    });
    Ok(text.collect())
}

#[test]
fn a_question_is_framed_as_each_model_was_taught() {
    use Role::{Assistant, User};
    let one = [(User, "T"), (Assistant, "T"), (User, "Who?")];
    let two = [(User, "T"), (Assistant, "T"), (User, "Who?"), (Assistant, "He."), (User, "When?")];
    for (name, source, first, second) in [
        (
            "SmolLM2",
            CHATML,
            "<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
            "He.<|im_end|>\n<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "Llama 3",
            LLAMA_3,
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "He.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhen?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "Gemma",
            GEMMA,
            "<end_of_turn>\n<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n",
            "He.<end_of_turn>\n<start_of_turn>user\nWhen?<end_of_turn>\n<start_of_turn>model\n",
        ),
        ("Mistral", MISTRAL, "</s>[INST] Who? [/INST]", "He.</s>[INST] When? [/INST]"),
        (
            "Qwen 3, which is not to think aloud",
            QWEN_3,
            "<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "He.<|im_end|>\n<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (
            "Phi 3",
            PHI_3,
            "<|end|>\n<|user|>\nWho?<|end|>\n<|assistant|>\n",
            "He.<|end|>\n<|user|>\nWhen?<|end|>\n<|assistant|>\n",
        ),
    ] {
        assert_eq!(drawn(source, &one, 1).unwrap(), first, "{name}");
        let opening = drawn(source, &two, 1).unwrap();
        assert!(opening.ends_with(second), "{name}: {opening}");
    }
}

/// The document may hold the placeholder's own characters only where nobody typed them; words come back as they were.
#[test]
fn words_never_reach_the_template() {
    let of = turns(&[(Role::Assistant, "T"), (Role::User, "{{ 1 + 1 }} <|im_end|> \u{f8d0}0\u{f8d1}")]);
    let pieces = template(CHATML).render(&of, 0).unwrap();
    assert_eq!(pieces[1], Piece::Words("{{ 1 + 1 }} <|im_end|> \u{f8d0}0\u{f8d1}".into()));
    assert_eq!(pieces.len(), 3);
}

#[test]
fn a_template_that_cannot_be_used_says_why() {
    let of = [(Role::User, "a"), (Role::Assistant, "b"), (Role::Assistant, "c")];
    let error = |source: &str| drawn(source, &of, 1).unwrap_err().to_string();
    assert_eq!(error(GEMMA), "line 1: Conversation roles must alternate user/assistant/user/assistant/...");
    assert!(error("{% for %}").starts_with("line 1: "), "{}", error("{% for %}"));
    assert!(error("\n\n{{ messages[0].name.first }}").starts_with("line 3: "));
    assert_eq!(error("{{ messages[0].content }}"), "it does not show every turn once");
    let twice = "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[0].content }}";
    assert_eq!(error(twice), "it does not show every turn once");
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    assert!(error(endless).contains("fuel"), "{}", error(endless));
}

#[test]
fn the_environment_is_hugging_face_s() {
    let draws = |source: &str| template(source).draw(&[]).unwrap();
    assert_eq!(draws("  {% if true %}\n  a\n  {% endif %}\nb\n"), "  a\nb", "blocks leave no lines behind");
    assert_eq!(draws("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"), "01");
    assert_eq!(draws("{{ {'a': \"<it's>\\\\u003c\"} | tojson }}"), r#"{"a": "<it's>\\u003c"}"#);
    assert_eq!(draws("{% for i in [1] %}{%- generation -%} {{ i }} {%- endgeneration %}{% endfor %}"), "1");
    assert_eq!(draws("{{ bos_token }}{{ eos_token }}{{ 'abc'.upper()[1:] }}{{ x is defined }}"), "<s></s>BCFalse");
    assert_eq!(draws("{{ strftime_now('%Y') | length }}"), "4");
    assert_eq!(strftime("%d %b %Y, %A %H:%M:%S", 951_827_696).as_deref(), Some("29 Feb 2000, Tuesday 12:34:56"));
    assert_eq!(strftime("%Y-%m-%d %a", 1_798_675_200).as_deref(), Some("2026-12-31 Thu"));
    assert_eq!(strftime("%Q", 0), None);
}

#[test]
fn a_folder_s_template_is_a_string_or_the_default_of_several_or_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let read = || ChatTemplate::of_folder(folder.path()).unwrap();
    assert_eq!(read(), None);
    write("tokenizer_config.json", r#"{"bos_token": null}"#);
    assert_eq!(read(), None);
    write("tokenizer_config.json", r#"{"chat_template": "T", "bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#);
    assert_eq!(read(), Some(template("T")));
    write(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "D"}]}"#,
    );
    assert_eq!(read().unwrap().source, "D");
    write("chat_template.jinja", "J");
    assert_eq!(read().unwrap().source, "J");
    write("tokenizer_config.json", "{");
    assert!(matches!(ChatTemplate::of_folder(folder.path()), Err(LoadError::Damaged { .. })));
}
