//! A memory in process and the same memory behind the service give the same answers, and the service keeps its
//! promises to callers that are slow, impatient, wrong or gone.
//!
//! The memory here is a double: it records what it is asked and answers with values drawn from the request itself, so
//! that a changed bit anywhere on the way in or out changes an answer.

mod agreement;
mod bad_input;
mod bounds;
mod cache;
mod double;
mod lifecycle;
mod patience;
mod raw;
mod refusals;
mod requests;
mod service;
