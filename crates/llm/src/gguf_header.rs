//! What does the header of a GGUF file say: its settings, and where its tensors lie?
//!
//! It is read here and not by candle, which cannot tell a file that is whole but has tensors of another format from one that
//! is damaged, divides by an alignment of 0, and takes the last of two entries of one name.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value;

use super::error::LoadError;
use landmarkdb::limits::{GGUF_ENTRIES_MAX, GGUF_VALUES_MAX};
use linalg::BlockFormat;

pub(super) const MAGIC: &[u8; 4] = b"GGUF";

/// Where tensors begin in files that do not say.
const ALIGNMENT_BYTES: u64 = 32;

const DIMENSIONS_MAX: u32 = 4;

/// The form of a tensor's numbers.
#[derive(Clone, Copy)]
pub(super) enum Format {
    F32,
    Blocks(BlockFormat),
}

/// The formats of tensors that can be read.
const READABLE: [(u32, Format); 15] = [
    (0, Format::F32),
    (1, Format::Blocks(BlockFormat::F16)),
    (2, Format::Blocks(BlockFormat::Q4_0)),
    (3, Format::Blocks(BlockFormat::Q4_1)),
    (6, Format::Blocks(BlockFormat::Q5_0)),
    (7, Format::Blocks(BlockFormat::Q5_1)),
    (8, Format::Blocks(BlockFormat::Q8_0)),
    (10, Format::Blocks(BlockFormat::Q2K)),
    (11, Format::Blocks(BlockFormat::Q3K)),
    (12, Format::Blocks(BlockFormat::Q4K)),
    (13, Format::Blocks(BlockFormat::Q5K)),
    (14, Format::Blocks(BlockFormat::Q6K)),
    (20, Format::Blocks(BlockFormat::Iq4Nl)),
    (23, Format::Blocks(BlockFormat::Iq4Xs)),
    (30, Format::Blocks(BlockFormat::Bf16)),
];

/// Other formats that ggml has numbers for.
const OTHER: [(u32, &str); 19] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
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
    pub(super) fn bytes(&self, path: &Path, name: &str, entry: &TensorEntry) -> Result<Vec<u8>, LoadError> {
        // `check_places` compared it with the file's length, so this allocates no more than the file holds.
        let length = tensor_bytes(&entry.dims, entry.format(path, name)?).unwrap_or_default();
        let mut bytes = vec![0; length as usize];
        let read = |mut file: File| {
            file.seek(SeekFrom::Start(self.data_start.saturating_add(entry.offset)))?;
            file.read_exact(&mut bytes)
        };
        File::open(path).and_then(read).map_err(|source| LoadError::Io { path: path.into(), source })?;
        Ok(bytes)
    }
}

impl TensorEntry {
    fn readable(&self) -> Option<Format> {
        READABLE.iter().find(|(number, _)| *number == self.format).map(|&(_, format)| format)
    }

    /// The format that the tensor is read in.
    pub(super) fn format(&self, path: &Path, name: &str) -> Result<Format, LoadError> {
        let found = || {
            let named = OTHER.iter().find(|(number, _)| *number == self.format).map(|(_, name)| name.to_string());
            named.unwrap_or_else(|| format!("number {} of ggml's formats", self.format))
        };
        self.readable().ok_or_else(|| LoadError::Unsupported {
            path: path.into(),
            key: format!("tensor {name}"),
            expected: "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL or IQ4_XS".into(),
            found: found(),
            way_out: Some("take the same model in one of these formats"),
        })
    }
}

/// Bytes of a tensor; none if they are no whole number of blocks, or too many to count.
fn tensor_bytes(dims: &[usize], format: Format) -> Option<u64> {
    let (values, bytes) = match format {
        Format::F32 => (1, size_of::<f32>()),
        Format::Blocks(format) => (format.values(), format.bytes()),
    };
    let elements = dims.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim as u64))?;
    let block = values as u64;
    if !elements.is_multiple_of(block) || dims.last().is_some_and(|&row| !(row as u64).is_multiple_of(block)) {
        return None;
    }
    (elements / block).checked_mul(bytes as u64)
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

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    use super::*;

    /// Writes one tensor `(5, 512)` as candle quantizes it.
    fn write(path: &Path, dtype: GgmlDType) -> QTensor {
        let values = Tensor::randn(0f32, 1.0, (5, 512), &Device::Cpu).unwrap();
        let tensor = QTensor::quantize(&values, dtype).unwrap();
        gguf_file::write(&mut File::create(path).unwrap(), &[], &[("t", &tensor)]).unwrap();
        tensor
    }

    fn read(path: &Path) -> (Format, Vec<u8>) {
        let header = Header::read(path).unwrap();
        header.check_places(path).unwrap();
        let entry = &header.tensors["t"];
        assert_eq!(entry.dims, [5, 512]);
        (entry.format(path, "t").unwrap(), header.bytes(path, "t", entry).unwrap())
    }

    #[test]
    fn tensors_of_every_format_are_what_candle_reads() {
        use GgmlDType::*;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        for dtype in [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K] {
            let tensor = write(&path, dtype);
            let (format, bytes) = read(&path);
            assert_eq!(bytes, *tensor.data().unwrap(), "{dtype:?}");
            let Format::Blocks(format) = format else { continue };
            let wanted: Vec<f32> = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let found = format.widen(&bytes);
            assert_eq!(found.len(), wanted.len());
            let near = |(found, wanted): (&f32, &f32)| (found - wanted).abs() < 1e-5;
            assert!(found.iter().zip(&wanted).all(near), "{dtype:?} as {format:?}");
        }
    }

    /// Blocks of it are as long as those of q4_0.
    #[test]
    fn tensors_of_a_format_that_candle_does_not_know_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let tensor = write(&path, GgmlDType::Q4_0);
        let mut file = std::fs::read(&path).unwrap();
        // Magic, version, two counts, the name behind its length, the number of dimensions and two of them.
        let at = 4 + 4 + 16 + 8 + 1 + 4 + 16;
        assert_eq!(file[at..at + 4], 2_u32.to_le_bytes());
        file[at..at + 4].copy_from_slice(&20_u32.to_le_bytes());
        std::fs::write(&path, file).unwrap();
        let (format, bytes) = read(&path);
        assert!(matches!(format, Format::Blocks(BlockFormat::Iq4Nl)));
        assert_eq!(bytes, *tensor.data().unwrap());
    }
}
