//! The one map between `MemoryError` and gRPC status, both ways.
//!
//! The code is for programs that know gRPC but not us; the typed `Error` travels beside it as the first detail of a
//! google.rpc.Status, where generic tools look for it, and gives our client back the very error the memory returned. What
//! is worth another try says when, as google.rpc.RetryInfo.

use std::error::Error as _;

use bytes::Bytes;
use prost::Message;
use tonic::{Code, Status, TimeoutExpired};

use super::error::cut;
use super::v1;
use landmarkdb::MemoryError;

const ERROR_TYPE_URL: &str = "type.googleapis.com/landmark.v1.Error";
const RETRY_TYPE_URL: &str = "type.googleapis.com/google.rpc.RetryInfo";

/// google.rpc.Status, the envelope that gRPC prescribes for details.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// google.protobuf.Any.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

/// google.rpc.RetryInfo: when generic clients try again.
#[derive(Clone, PartialEq, Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    retry_delay: Option<Delay>,
}

/// google.protobuf.Duration.
#[derive(Clone, PartialEq, Message)]
struct Delay {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

/// What a server answers.
pub fn to_status(error: &MemoryError) -> Status {
    let code = code(error);
    let message = cut(error.to_string());
    let detail = Any { type_url: ERROR_TYPE_URL.into(), value: v1::Error::from(error).encode_to_vec().into() };
    let details = [detail].into_iter().chain(retry_info(error)).collect();
    let envelope = RpcStatus { code: code.into(), message: message.clone(), details };
    Status::with_details(code, message, envelope.encode_to_vec().into())
}

fn retry_info(error: &MemoryError) -> Option<Any> {
    let MemoryError::Busy { retry_ms, .. } = *error else { return None };
    let delay = Delay { seconds: (retry_ms / 1000) as i64, nanos: (retry_ms % 1000) as i32 * 1_000_000 };
    let value = RetryInfo { retry_delay: Some(delay) }.encode_to_vec().into();
    Some(Any { type_url: RETRY_TYPE_URL.into(), value })
}

/// What a client makes of an answer. `target` and `deadline_ms` tell whom it asked and how long it gave, for errors
/// that the network made and no server of ours.
pub fn from_status(status: &Status, target: &str, deadline_ms: u64) -> MemoryError {
    if let Some(error) = detail(status) {
        return error;
    }
    let found = || status.message().to_string();
    // Both sides of tonic report a passed deadline as CANCELLED with this text.
    if status.code() == Code::DeadlineExceeded || status.message() == TimeoutExpired(()).to_string() {
        return MemoryError::DeadlineExceeded { ms: deadline_ms };
    }
    // A status with a source was made on this side, out of what happened to the connection.
    if status.source().is_some() || matches!(status.code(), Code::Unavailable | Code::Cancelled) {
        return MemoryError::Unavailable { target: target.into(), detail: causes(status) };
    }
    match status.code() {
        Code::OutOfRange => MemoryError::Invalid {
            field: "message".into(),
            expected: "no more bytes than both sides allow".into(),
            found: found(),
        },
        Code::InvalidArgument => {
            MemoryError::Invalid { field: "request".into(), expected: "what the service takes".into(), found: found() }
        }
        code => MemoryError::Internal { detail: format!("{target} answered {code:?}: {}", status.message()) },
    }
}

fn code(error: &MemoryError) -> Code {
    match error {
        MemoryError::NotFound { .. } => Code::NotFound,
        MemoryError::Missing { .. } | MemoryError::Invalid { .. } => Code::InvalidArgument,
        MemoryError::Conflict { .. } => Code::AlreadyExists,
        MemoryError::FingerprintMismatch { .. }
        | MemoryError::Sealed { .. }
        | MemoryError::OutOfOrder { .. }
        | MemoryError::UnexpectedLength { .. }
        | MemoryError::ReadOnly
        | MemoryError::Locked { .. } => Code::FailedPrecondition,
        MemoryError::LimitExceeded { .. } | MemoryError::Busy { .. } => Code::ResourceExhausted,
        MemoryError::DataLoss { .. } => Code::DataLoss,
        MemoryError::Unavailable { .. } => Code::Unavailable,
        MemoryError::DeadlineExceeded { .. } => Code::DeadlineExceeded,
        // Storage, Internal, and kinds without a message.
        _ => Code::Internal,
    }
}

fn detail(status: &Status) -> Option<MemoryError> {
    let envelope = RpcStatus::decode(status.details()).ok()?;
    let detail = envelope.details.into_iter().find(|detail| detail.type_url == ERROR_TYPE_URL)?;
    v1::Error::decode(detail.value).ok()?.try_into().ok()
}

/// The message and what it came from: tonic's own messages ("transport error") name no reason.
fn causes(status: &Status) -> String {
    let mut text = status.message().to_string();
    let mut cause = status.source();
    while let Some(error) = cause {
        let line = error.to_string();
        if !text.contains(&line) {
            text = if text.is_empty() { line } else { format!("{text}: {line}") };
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use landmarkdb::{BlockId, DocumentId, Entity, Fingerprint};

    fn every_error() -> Vec<(MemoryError, Code)> {
        let document = DocumentId(u64::MAX);
        let text = || "näme".to_string();
        let mut errors: Vec<(MemoryError, Code)> = [Entity::Collection, Entity::Document, Entity::Block]
            .map(|entity| (MemoryError::NotFound { entity, id: text() }, Code::NotFound))
            .into();
        errors.extend([None, Some(BlockId { document, index: 7 })].map(|block| {
            let error = MemoryError::DataLoss { block, detail: text() };
            (error, Code::DataLoss)
        }));
        errors.extend([
            (MemoryError::Missing { field: text() }, Code::InvalidArgument),
            (MemoryError::Invalid { field: text(), expected: "1".into(), found: "2".into() }, Code::InvalidArgument),
            (
                MemoryError::FingerprintMismatch {
                    collection: text(),
                    stored: Fingerprint([1; 32]),
                    offered: Fingerprint([2; 32]),
                },
                Code::FailedPrecondition,
            ),
            (MemoryError::Conflict { document, index: 0 }, Code::AlreadyExists),
            (MemoryError::Sealed { document }, Code::FailedPrecondition),
            (MemoryError::OutOfOrder { document, expected: 3, found: u32::MAX }, Code::FailedPrecondition),
            (MemoryError::UnexpectedLength { document, expected: 0, found: u64::MAX }, Code::FailedPrecondition),
            (MemoryError::LimitExceeded { what: text(), limit: 1, found: u64::MAX }, Code::ResourceExhausted),
            (MemoryError::Busy { what: text(), retry_ms: 250 }, Code::ResourceExhausted),
            (MemoryError::Storage { detail: text() }, Code::Internal),
            (MemoryError::ReadOnly, Code::FailedPrecondition),
            (MemoryError::Locked { path: text() }, Code::FailedPrecondition),
            (MemoryError::Unavailable { target: text(), detail: text() }, Code::Unavailable),
            (MemoryError::DeadlineExceeded { ms: 5 }, Code::DeadlineExceeded),
            (MemoryError::Internal { detail: text() }, Code::Internal),
        ]);
        errors
    }

    #[test]
    fn every_error_comes_back_as_it_went() {
        for (error, code) in every_error() {
            let status = to_status(&error);
            assert_eq!(status.code(), code, "{error:?}");
            assert_eq!(from_status(&status, "elsewhere", 1), error);
        }
    }

    #[test]
    fn who_comes_too_early_is_told_when_to_come_again() {
        let status = to_status(&MemoryError::Busy { what: "memory".into(), retry_ms: 1250 });
        let details = RpcStatus::decode(status.details()).unwrap().details;
        let retry = details.iter().find(|detail| detail.type_url == RETRY_TYPE_URL).unwrap();
        let delay = RetryInfo::decode(retry.value.clone()).unwrap().retry_delay;
        assert_eq!(delay, Some(Delay { seconds: 1, nanos: 250_000_000 }));
    }

    #[test]
    fn long_texts_are_cut_between_characters_and_fit_a_trailer() {
        let long = "ä".repeat(100_000);
        let error = MemoryError::Invalid { field: long.clone(), expected: long.clone(), found: long };
        let status = to_status(&error);
        let MemoryError::Invalid { found, .. } = from_status(&status, "", 0) else { panic!("{status:?}") };
        assert_eq!(found, "ä".repeat(512));
        assert!(status.details().len() + 3 * status.message().len() < 8192);
    }

    #[test]
    fn statuses_of_others_are_understood() {
        let of = |code: Code, text: &str| from_status(&Status::new(code, text), "there", 9);
        assert_eq!(of(Code::DeadlineExceeded, "late"), MemoryError::DeadlineExceeded { ms: 9 });
        assert_eq!(of(Code::Cancelled, "Timeout expired"), MemoryError::DeadlineExceeded { ms: 9 });
        assert!(matches!(of(Code::Unavailable, "gone"), MemoryError::Unavailable { target, .. } if target == "there"));
        assert!(matches!(of(Code::OutOfRange, "too large"), MemoryError::Invalid { .. }));
        assert!(matches!(of(Code::Unimplemented, "what"), MemoryError::Internal { .. }));
        let damaged = Status::with_details(Code::NotFound, "x", Bytes::from_static(&[0xff; 9]));
        assert!(matches!(from_status(&damaged, "", 0), MemoryError::Internal { .. }));
    }
}
