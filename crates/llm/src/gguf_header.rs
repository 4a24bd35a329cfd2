//! What does the header of a GGUF file say: its settings, and where its tensors lie?
//!
//! It is read here and not by candle, which cannot tell a file that is whole but has tensors of another format from one that
//! is damaged, divides by an alignment of 0, and takes the last of two entries of one name.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{TensorInfo, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Shape};

use super::error::LoadError;
use landmarkdb::limits::{GGUF_ENTRIES_MAX, GGUF_VALUES_MAX};

pub(super) const MAGIC: &[u8; 4] = b"GGUF";

/// Where tensors begin in files that do not say.
const ALIGNMENT_BYTES: u64 = 32;

const DIMENSIONS_MAX: u32 = 4;

/// The formats of tensors that can be read.
const READABLE: [(u32, GgmlDType); 13] = [
    (0, GgmlDType::F32),
    (1, GgmlDType::F16),
    (2, GgmlDType::Q4_0),
    (3, GgmlDType::Q4_1),
    (6, GgmlDType::Q5_0),
    (7, GgmlDType::Q5_1),
    (8, GgmlDType::Q8_0),
    (10, GgmlDType::Q2K),
    (11, GgmlDType::Q3K),
    (12, GgmlDType::Q4K),
    (13, GgmlDType::Q5K),
    (14, GgmlDType::Q6K),
    (30, GgmlDType::BF16),
];

/// Other formats that ggml has numbers for.
const OTHER: [(u32, &str); 21] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

/// Above the last of [`OTHER`] there is room for formats that are yet to come; far above it there is only damage.
const FORMAT_MAX: u32 = 255;

/// What a file says of itself.
pub(super) struct Header {
    pub(super) settings: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, TensorEntry>,
    alignment: u64,
    /// Where the tensors' bytes begin in the file.
    data_start: u64,
    file_bytes: u64,
}

/// What the header says of a tensor.
pub(super) struct TensorEntry {
    /// As candle writes them: the longest stride first.
    pub(super) dims: Vec<usize>,
    /// ggml's number of it.
    format: u32,
    /// From where the tensors' bytes begin.
    offset: u64,
}

impl Header {
    pub(super) fn read(path: &Path) -> Result<Self, LoadError> {
        let mut reader = Reader::open(path)?;
        let found = reader.bytes(MAGIC.len() as u64)?;
        if found != MAGIC {
            let expected = "a file that begins with GGUF";
            return Err(reader.damaged(format!("expected {expected}, found {:?}", String::from_utf8_lossy(&found))));
        }
        let version = reader.u32()?;
        if !matches!(version, 2 | 3) {
            let swapped = matches!(version.swap_bytes(), 2 | 3);
            let found = if swapped { "big-endian numbers".to_string() } else { version.to_string() };
            return Err(unsupported(path, "version of GGUF", "2 or 3, little-endian", &found));
        }
        let (tensor_count, setting_count) = (reader.count("tensors")?, reader.count("settings")?);
        let mut settings = BTreeMap::new();
        for _ in 0..setting_count {
            let key = reader.string()?;
            let kind = reader.u32()?;
            let value = reader.value(kind)?;
            if settings.insert(key.clone(), value).is_some() {
                return Err(reader.damaged(format!("the setting {key} is there twice")));
            }
        }
        let alignment = alignment(path, &settings)?;
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let name = reader.string()?;
            let entry = reader.tensor(&name)?;
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(reader.damaged(format!("the tensor {name} is there twice")));
            }
        }
        let data_start = reader.position.next_multiple_of(alignment);
        Ok(Header { settings, tensors, alignment, data_start, file_bytes: reader.end })
    }

    /// Refuses tensors that do not lie in the file, at its alignment, or that lie in another: one whose bytes begin anywhere
    /// else than where they were written is read shifted.
    pub(super) fn check_places(&self, path: &Path) -> Result<(), LoadError> {
        let alignment = self.alignment;
        let damaged = |detail| LoadError::Damaged { path: path.into(), detail };
        let mut places: Vec<(u64, u64, &str)> = Vec::new();
        for (name, tensor) in &self.tensors {
            if tensor.offset % alignment != 0 {
                let detail = format!("tensor {name}: expected a multiple of {alignment}, found {}", tensor.offset);
                return Err(damaged(detail));
            }
            // The length of a format that cannot be read is not known; such a tensor is refused when it is asked for.
            let Some(format) = tensor.readable() else { continue };
            let bytes = tensor_bytes(&tensor.dims, format);
            let bytes = bytes.ok_or_else(|| damaged(format!("tensor {name}: {:?} numbers", tensor.dims)))?;
            let end = self.data_start.checked_add(tensor.offset).and_then(|start| start.checked_add(bytes));
            if end.is_none_or(|end| end > self.file_bytes) {
                let detail =
                    format!("tensor {name}: {bytes} bytes from {} on, the file has {}", tensor.offset, self.file_bytes);
                return Err(damaged(detail));
            }
            places.push((tensor.offset, tensor.offset + bytes, name));
        }
        places.sort_unstable();
        match places.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            Some(pair) => Err(damaged(format!("the tensors {} and {} overlap", pair[0].2, pair[1].2))),
            None => Ok(()),
        }
    }

    /// Reads one tensor's bytes. Opens the file anew, so that threads do not share a position.
    pub(super) fn tensor(&self, path: &Path, name: &str, entry: &TensorEntry) -> Result<QTensor, LoadError> {
        let format = entry.format(path, name)?;
        let mut file = File::open(path).map_err(|source| LoadError::Io { path: path.into(), source })?;
        let info = TensorInfo { ggml_dtype: format, shape: Shape::from(entry.dims.clone()), offset: entry.offset };
        info.read(&mut file, self.data_start, &Device::Cpu)
            .map_err(|error| LoadError::damaged_tensor(path, name, error))
    }
}

impl TensorEntry {
    fn readable(&self) -> Option<GgmlDType> {
        READABLE.iter().find(|(number, _)| *number == self.format).map(|&(_, format)| format)
    }

    /// The format that the tensor is read in.
    pub(super) fn format(&self, path: &Path, name: &str) -> Result<GgmlDType, LoadError> {
        let found = || {
            let named = OTHER.iter().find(|(number, _)| *number == self.format).map(|(_, name)| name.to_string());
            named.unwrap_or_else(|| format!("number {} of ggml's formats", self.format))
        };
        self.readable().ok_or_else(|| LoadError::Unsupported {
            path: path.into(),
            key: format!("tensor {name}"),
            expected: "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K".into(),
            found: found(),
            way_out: Some("take the same model in one of these formats"),
        })
    }
}

/// Bytes of a tensor; none if they are no whole number of blocks, or too many to count.
fn tensor_bytes(dims: &[usize], format: GgmlDType) -> Option<u64> {
    let elements = dims.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim as u64))?;
    let block = format.block_size() as u64;
    if !elements.is_multiple_of(block) || dims.last().is_some_and(|&row| !(row as u64).is_multiple_of(block)) {
        return None;
    }
    (elements / block).checked_mul(format.type_size() as u64)
}

fn alignment(path: &Path, settings: &BTreeMap<String, Value>) -> Result<u64, LoadError> {
    let key = "general.alignment";
    let found = match settings.get(key) {
        None => return Ok(ALIGNMENT_BYTES),
        Some(Value::U32(found)) => *found as u64,
        Some(other) => return Err(unsupported(path, key, "a number of 32 bits", &format!("{other:?}"))),
    };
    // 1 is what no tensor's place contradicts.
    match found.is_power_of_two() {
        true => Ok(found),
        false => Err(unsupported(path, key, "a power of two", &found.to_string())),
    }
}

fn unsupported(path: &Path, key: &str, expected: &str, found: &str) -> LoadError {
    let (key, expected, found) = (key.into(), expected.into(), found.into());
    LoadError::Unsupported { path: path.into(), key, expected, found, way_out: None }
}

/// A file from its beginning on. What it claims to hold is compared with what is left of it before memory is taken.
struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    position: u64,
    end: u64,
    /// Entries of lists that may still come.
    values_left: u64,
}

impl Reader {
    fn open(path: &Path) -> Result<Self, LoadError> {
        let io = |source| LoadError::Io { path: path.into(), source };
        let mut file = File::open(path).map_err(io)?;
        let end = file.seek(SeekFrom::End(0)).map_err(io)?;
        file.rewind().map_err(io)?;
        let values_left = GGUF_VALUES_MAX;
        Ok(Reader { path: path.into(), file: BufReader::new(file), position: 0, end, values_left })
    }

    fn damaged(&self, detail: String) -> LoadError {
        LoadError::Damaged { path: self.path.clone(), detail }
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>, LoadError> {
        let left = self.end - self.position;
        if count > left {
            let detail = format!("at byte {}: expected {count} more bytes, found {left}", self.position);
            return Err(self.damaged(detail));
        }
        let mut bytes = vec![0; count as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], LoadError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), LoadError> {
        let at = self.position;
        self.position += bytes.len() as u64;
        self.file.read_exact(bytes).map_err(|source| match source.kind() {
            std::io::ErrorKind::UnexpectedEof => self.damaged(format!("it ends within its header, after byte {at}")),
            _ => LoadError::Io { path: self.path.clone(), source },
        })
    }

    fn u32(&mut self) -> Result<u32, LoadError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, LoadError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of entries of the header.
    fn count(&mut self, what: &str) -> Result<u64, LoadError> {
        let found = self.u64()?;
        if found > GGUF_ENTRIES_MAX {
            return Err(self.damaged(format!("expected at most {GGUF_ENTRIES_MAX} {what}, found {found}")));
        }
        Ok(found)
    }

    /// Some writers end strings with a zero, and vocabularies hold tokens that are no whole characters.
    fn string(&mut self) -> Result<String, LoadError> {
        let length = self.u64()?;
        let mut bytes = self.bytes(length)?;
        bytes.truncate(bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1));
        Ok(String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    fn value(&mut self, kind: u32) -> Result<Value, LoadError> {
        Ok(match kind {
            0 => Value::U8(self.array::<1>()?[0]),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::String(self.string()?),
            9 => self.list()?,
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            other => return Err(self.damaged(format!("at byte {}: no value is of kind {other}", self.position))),
        })
    }

    fn list(&mut self) -> Result<Value, LoadError> {
        let (kind, count) = (self.u32()?, self.u64()?);
        if kind == 9 {
            return Err(self.damaged(format!("at byte {}: a list of lists", self.position)));
        }
        self.values_left = self.values_left.checked_sub(count).ok_or_else(|| {
            self.damaged(format!("at byte {}: lists of more than {GGUF_VALUES_MAX} values", self.position))
        })?;
        // Grows with what is there, not with what was claimed.
        let mut values = Vec::new();
        for _ in 0..count {
            values.push(self.value(kind)?);
        }
        Ok(Value::Array(values))
    }

    fn tensor(&mut self, name: &str) -> Result<TensorEntry, LoadError> {
        let count = self.u32()?;
        if count > DIMENSIONS_MAX {
            let detail = format!("tensor {name}: expected at most {DIMENSIONS_MAX} dimensions, found {count}");
            return Err(self.damaged(detail));
        }
        let mut dims = Vec::new();
        for _ in 0..count {
            let dim = self.u64()?;
            dims.push(usize::try_from(dim).map_err(|_| self.damaged(format!("tensor {name}: {dim} numbers")))?);
        }
        dims.reverse();
        let format = self.u32()?;
        if format > FORMAT_MAX {
            return Err(self.damaged(format!("tensor {name}: no format has the number {format}")));
        }
        Ok(TensorEntry { dims, format, offset: self.u64()? })
    }
}
