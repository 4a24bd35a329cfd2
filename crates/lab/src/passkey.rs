//! The words of the passkey task (Mohtashami and Jaggi 2023, section 4.2). A model is asked in the very words that it was
//! trained on, so training and evaluation take them from here.

/// What the model is to do.
pub(crate) const TASK: &str = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I \
                        will quiz you about the important information there.\n";

/// One cycle of the irrelevant text.
pub(crate) const GARBAGE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ";

/// On the line after the text, as in the paper: an empty line between them makes a small model go on with prose, and not
/// only with a memory but with full attention too. The answer is a space and the key.
pub(crate) const QUESTION: &str = "What is the pass key? The pass key is";

/// Digits of a key.
pub(crate) const KEY_DIGITS: usize = 5;

/// The line that hides `key`, without its end.
pub(crate) fn information(key: &str) -> String {
    format!("The pass key is {key}. Remember it. {key} is the pass key.")
}
