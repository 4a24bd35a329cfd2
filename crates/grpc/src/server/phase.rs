//! Where the service is between its start and its end.

/// Where the service is on its way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Phase {
    Serving,
    /// Takes no more calls, finishes those in flight.
    Draining,
    /// Ends what is left.
    Over,
}
