//! Models that ship inside Python packages, so that they can be had where a package index is all there is.

/// A model in one file.
pub(super) struct Packaged {
    /// What a person writes.
    pub(super) name: &'static str,
    /// In the folder of models.
    pub(super) file: &'static str,
}

/// The default model comes first.
pub(super) static PACKAGED: [Packaged; 2] = [
    Packaged { name: "smollm2", file: "SmolLM2-135M-Instruct.Q4_1.gguf" },
    Packaged { name: "gemma3-270m", file: "gemma-3-270m-q4_k_m.gguf" },
];

impl Packaged {
    /// The model of this name.
    pub(super) fn find(name: &str) -> Option<&'static Self> {
        PACKAGED.iter().find(|packaged| packaged.name == name)
    }
}
