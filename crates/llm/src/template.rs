//! A model's own chat template: Jinja, as Hugging Face's tokenizers and llama.cpp run it.
//!
//! A template is handed placeholders in place of what people and models said. What it draws is then its own markup, whose
//! control tokens are meant, and between them the words, whose control tokens are text.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::Value as Json;

use super::error::{LoadError, TemplateError};
use super::gguf::Gguf;
use super::huggingface::read_json;

/// What a template may compute: it comes with a file from somewhere. Real ones take some thousands for a short conversation.
const FUEL: u64 = 10_000_000;

/// Private characters that begin and end a placeholder.
const PLACEHOLDER: [char; 2] = ['\u{f8d0}', '\u{f8d1}'];

/// How a model was taught that turns of a conversation begin and end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTemplate {
    /// In Jinja.
    pub source: String,
    /// What the template calls `bos_token`; empty where the model has none.
    pub bos: String,
    /// What it calls `eos_token`.
    pub eos: String,
}

/// Whose words a turn holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    User,
    Assistant,
}

/// A part of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Of the template: control tokens spelled in it are control tokens.
    Markup(String),
    /// Somebody's words: what is spelled in them is text.
    Words(String),
}

impl ChatTemplate {
    /// A GGUF file's, if it has one.
    pub(super) fn of_gguf(gguf: &Gguf) -> Result<Option<Self>, LoadError> {
        let Some(source) = gguf.text_if_any("tokenizer.chat_template")? else { return Ok(None) };
        let tokens = gguf.texts("tokenizer.ggml.tokens")?;
        let token = |key: &str| {
            let id = gguf.settings_under(key).next().map(|_| gguf.number(key)).transpose()?;
            Ok(id.and_then(|id| tokens.get(id as usize)).map(|token| token.to_string()).unwrap_or_default())
        };
        let (bos, eos) = (token("tokenizer.ggml.bos_token_id")?, token("tokenizer.ggml.eos_token_id")?);
        Ok(Some(ChatTemplate { source: source.into(), bos, eos }))
    }

    /// A Hugging Face folder's, if it has one: in a file of its own, or in `tokenizer_config.json`, which may hold several by name.
    pub(super) fn of_folder(folder: &Path) -> Result<Option<Self>, LoadError> {
        let (config, file) = (folder.join("tokenizer_config.json"), folder.join("chat_template.jinja"));
        let config: Json = if config.exists() { read_json(&config)? } else { Json::Null };
        let source = match &config["chat_template"] {
            _ if file.exists() => {
                Some(std::fs::read_to_string(&file).map_err(|source| LoadError::Io { path: file, source })?)
            }
            Json::Array(named) => {
                let default = named.iter().find(|template| template["name"] == "default");
                default.and_then(|template| template["template"].as_str()).map(str::to_string)
            }
            template => template.as_str().map(str::to_string),
        };
        // A token is a string, or an object that says more about it.
        let token = |key: &str| {
            let token = &config[key];
            token.as_str().or(token["content"].as_str()).unwrap_or_default().to_string()
        };
        Ok(source.map(|source| ChatTemplate { source, bos: token("bos_token"), eos: token("eos_token") }))
    }

    /// What stands behind the words of the turn `after`, up to the place where the model answers.
    pub(super) fn render(&self, turns: &[(Role, String)], after: usize) -> Result<Vec<Piece>, TemplateError> {
        let message = |(index, (role, _)): (usize, &(Role, String))| {
            let role = match role {
                Role::User => "user",
                Role::Assistant => "assistant",
            };
            context! { role, content => placeholder(index) }
        };
        let messages: Vec<Value> = turns.iter().enumerate().map(message).collect();
        let drawn = self.draw(&messages).map_err(|error| TemplateError::Render {
            line: error.line().unwrap_or_default(),
            detail: error.detail().map_or_else(|| error.kind().to_string(), str::to_string),
        })?;
        let mut rest = drawn.as_str();
        let mut pieces = Vec::new();
        for (index, (_, words)) in turns.iter().enumerate() {
            let (before, behind) = rest.split_once(&placeholder(index)).ok_or(TemplateError::LostTurn)?;
            if before.contains(PLACEHOLDER) {
                return Err(TemplateError::LostTurn);
            }
            if index > after {
                pieces.extend([Piece::Markup(before.into()), Piece::Words(words.clone())]);
            }
            rest = behind;
        }
        if rest.contains(PLACEHOLDER) {
            return Err(TemplateError::LostTurn);
        }
        pieces.push(Piece::Markup(rest.into()));
        Ok(pieces)
    }

    fn draw(&self, messages: &[Value]) -> Result<String, Error> {
        let mut jinja = Environment::new();
        jinja.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        jinja.set_fuel(Some(FUEL));
        jinja.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        jinja.add_function("raise_exception", raise_exception);
        jinja.add_function("strftime_now", strftime_now);
        jinja.add_filter("tojson", tojson);
        let source = without_generation_tags(&self.source);
        jinja.template_from_str(&source)?.render(context! {
            messages,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            add_generation_prompt => true,
            // An answer, and not what a model thinks before it.
            enable_thinking => false,
        })
    }
}

fn placeholder(index: usize) -> String {
    let [begin, end] = PLACEHOLDER;
    format!("{begin}{index}{end}")
}

/// What a template calls where it cannot draw the turns it is given.
fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// As Hugging Face has it: JSON without escapes for HTML.
fn tojson(value: &Value, arguments: Kwargs) -> Result<Value, Error> {
    let indent: Option<Value> = arguments.get("indent")?;
    let json = minijinja::filters::tojson(value, indent, Kwargs::from_iter(std::iter::empty::<(&str, Value)>()))?;
    let mut plain = String::new();
    let mut rest = json.as_str().unwrap_or_default();
    while let Some(at) = rest.find('\\') {
        plain.push_str(&rest[..at]);
        let escape = &rest[at..];
        let html = [("\\u003c", "<"), ("\\u003e", ">"), ("\\u0026", "&"), ("\\u0027", "'")];
        let found = html.iter().find(|(escaped, _)| escape.starts_with(escaped));
        // Of any other escape the first two characters are kept, which may be a backslash that is escaped.
        let kept = escape.get(..2).unwrap_or(escape);
        let (escaped, letter) = found.copied().unwrap_or((kept, kept));
        plain.push_str(letter);
        rest = &escape[escaped.len()..];
    }
    Ok(Value::from(plain + rest))
}

/// Today in UTC, of which templates tell the model in words that stand before the documents and are left out here.
fn strftime_now(format: String) -> Result<String, Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    strftime(&format, now).ok_or_else(|| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}) has a field that is not known"))
    })
}

/// The fields that chat templates use.
fn strftime(format: &str, seconds: u64) -> Option<String> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant's civil calendar: years begin in March, so that a leap day ends one.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12;
    let year = era * 400 + year_of_era + (month < 2) as u64;
    let weekday = DAYS[(days % 7) as usize];

    let mut text = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        text += &match letters.next()? {
            'Y' => year.to_string(),
            'y' => format!("{:02}", year % 100),
            'm' => format!("{:02}", month + 1),
            'd' => format!("{day:02}"),
            'B' => MONTHS[month as usize].into(),
            'b' => MONTHS[month as usize][..3].into(),
            'A' => weekday.into(),
            'a' => weekday[..3].into(),
            'H' => format!("{:02}", second / 3_600),
            'M' => format!("{:02}", second / 60 % 60),
            'S' => format!("{:02}", second % 60),
            '%' => "%".into(),
            _ => return None,
        };
    }
    Some(text)
}

/// Hugging Face marks what a model generates by a tag of its own, which draws nothing.
fn without_generation_tags(source: &str) -> String {
    let mut plain = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        let (inner, behind) = tag.split_once("%}").unwrap_or((tag, ""));
        let closed = inner.len() < tag.len();
        let inner = match inner.trim_matches(['-', '+']).trim() {
            "generation" => inner.replace("generation", "if true"),
            "endgeneration" => inner.replace("endgeneration", "endif"),
            _ => inner.into(),
        };
        plain.extend([before, "{%", &inner, if closed { "%}" } else { "" }]);
        rest = behind;
    }
    plain + rest
}

#[cfg(test)]
mod tests;
