//! How much a service holds and how patient it is: the same settings as flags of `serve` and under `server.limits`.

use std::time::Duration;

use serde::Deserialize;

use landmarkdb::WORK_BYTES;
use landmarkdb_grpc::server::{ServeOptions, WORKERS_MAX};

use super::numbers::{from_one, integer};

/// What one source says. See [`ServiceLimits::out_of_range`].
#[derive(clap::Args, Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
#[command(next_help_heading = "Limits")]
pub(super) struct ServiceLimits {
    /// Threads for light calls, as many for writes, and half as many for heavy calls; 1 to 128 [default: twice the cores].
    #[arg(long, value_name = "COUNT", value_parser = integer::<u64>(1..=WORKERS_MAX as u32))]
    workers: Option<u64>,

    /// Memory for requests until they are answered and for replies until they are sent, in MiB; one message may take three quarters
    /// of it [default: 1539].
    #[arg(long, value_name = "MIB", value_parser = from_one::<u64>())]
    messages_mib: Option<u64>,

    /// Working memory of lookups, attends and appends in MiB; one may take three quarters of it [default: 512].
    #[arg(long, value_name = "MIB", value_parser = from_one::<u64>())]
    work_mib: Option<u64>,

    /// Maximum open connections; when all are taken, idle and resting ones are closed [default: 512].
    #[arg(long, value_name = "COUNT", value_parser = from_one::<u64>())]
    connections: Option<u64>,

    /// Concurrent calls per connection [default: 128].
    #[arg(long, value_name = "COUNT", value_parser = from_one::<u64>())]
    streams: Option<u64>,

    /// Timeout for the HTTP/2 greeting of a new connection [default: 10000].
    #[arg(long, value_name = "MS", value_parser = from_one::<u64>())]
    handshake_ms: Option<u64>,

    /// Close a connection after this long without a call [default: 600000].
    #[arg(long, value_name = "MS", value_parser = from_one::<u64>())]
    idle_ms: Option<u64>,

    /// Give up on a client that stops in the middle of a message, does not end its call, or does not read its reply, after so
    /// many milliseconds [default: 30000].
    #[arg(long, value_name = "MS", value_parser = from_one::<u64>())]
    stall_ms: Option<u64>,

    /// Interval of keepalive pings, and timeout of their answers [default: 20000].
    #[arg(long, value_name = "MS", value_parser = from_one::<u64>())]
    keepalive_ms: Option<u64>,

    /// Timeout for calls in flight after a signal [default: 30000].
    #[arg(long, value_name = "MS", value_parser = from_one::<u64>())]
    grace_ms: Option<u64>,
}

impl ServiceLimits {
    /// These settings, and `below`'s where there are none.
    pub(super) fn over(self, below: ServiceLimits) -> ServiceLimits {
        ServiceLimits {
            workers: self.workers.or(below.workers),
            messages_mib: self.messages_mib.or(below.messages_mib),
            work_mib: self.work_mib.or(below.work_mib),
            connections: self.connections.or(below.connections),
            streams: self.streams.or(below.streams),
            handshake_ms: self.handshake_ms.or(below.handshake_ms),
            idle_ms: self.idle_ms.or(below.idle_ms),
            stall_ms: self.stall_ms.or(below.stall_ms),
            keepalive_ms: self.keepalive_ms.or(below.keepalive_ms),
            grace_ms: self.grace_ms.or(below.grace_ms),
        }
    }

    /// The first setting of a file or the environment that is out of the range of its flag: its name, the range, and what it is.
    pub(super) fn out_of_range(&self) -> Option<(&'static str, String, u64)> {
        let all = [
            ("workers", self.workers),
            ("messages_mib", self.messages_mib),
            ("work_mib", self.work_mib),
            ("connections", self.connections),
            ("streams", self.streams),
            ("handshake_ms", self.handshake_ms),
            ("idle_ms", self.idle_ms),
            ("stall_ms", self.stall_ms),
            ("keepalive_ms", self.keepalive_ms),
            ("grace_ms", self.grace_ms),
        ];
        let most = |name| if name == "workers" { WORKERS_MAX as u64 } else { u64::MAX };
        let wrong = all.into_iter().find_map(|(name, value)| {
            value.filter(|value| !(1..=most(name)).contains(value)).map(|value| (name, value))
        });
        wrong.map(|(name, value)| match most(name) {
            u64::MAX => (name, "at least 1".into(), value),
            most => (name, format!("1 to {most}"), value),
        })
    }

    /// What they mean to the service.
    pub(super) fn options(&self) -> ServeOptions {
        let default = ServeOptions::default();
        let time = |ms: Option<u64>, default| ms.map_or(default, Duration::from_millis);
        ServeOptions {
            workers: self.workers.map_or(default.workers, |count| count as usize),
            message_bytes: self.messages_mib.map_or(default.message_bytes, bytes),
            connections: self.connections.map_or(default.connections, |count| count as usize),
            streams: self.streams.map_or(default.streams, |count| count.min(u32::MAX as u64) as u32),
            handshake: time(self.handshake_ms, default.handshake),
            idle: time(self.idle_ms, default.idle),
            stall: time(self.stall_ms, default.stall),
            keepalive: time(self.keepalive_ms, default.keepalive),
            grace: time(self.grace_ms, default.grace),
        }
    }

    /// Bytes that lookups, attends and appends work with.
    pub(super) fn work_bytes(&self) -> u64 {
        self.work_mib.map_or(WORK_BYTES, bytes)
    }
}

fn bytes(mib: u64) -> u64 {
    mib.saturating_mul(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every setting, each another number.
    fn every(first: u64) -> ServiceLimits {
        let at = |i| Some(first + i);
        ServiceLimits {
            workers: at(0),
            messages_mib: at(1),
            work_mib: at(2),
            connections: at(3),
            streams: at(4),
            handshake_ms: at(5),
            idle_ms: at(6),
            stall_ms: at(7),
            keepalive_ms: at(8),
            grace_ms: at(9),
        }
    }

    #[test]
    fn every_setting_is_taken_over_and_reaches_the_service() {
        assert_eq!(every(1).over(every(100)), every(1));
        assert_eq!(ServiceLimits::default().over(every(100)), every(100));
        let (options, ms) = (every(1).options(), Duration::from_millis);
        assert_eq!((options.workers, options.message_bytes, every(1).work_bytes()), (1, 2 << 20, 3 << 20));
        assert_eq!((options.connections, options.streams), (4, 5));
        assert_eq!((options.handshake, options.idle, options.stall), (ms(6), ms(7), ms(8)));
        assert_eq!((options.keepalive, options.grace), (ms(9), ms(10)));
        let wrong = |limits: ServiceLimits| limits.out_of_range();
        assert_eq!((wrong(every(1)), wrong(every(0))), (None, Some(("workers", "1 to 128".into(), 0))));
        let workers = ServiceLimits { workers: Some(129), ..every(1) };
        assert_eq!(wrong(workers).map(|(name, ..)| name), Some("workers"));
        let last = ServiceLimits { grace_ms: Some(0), ..every(1) };
        assert_eq!(wrong(last), Some(("grace_ms", "at least 1".into(), 0)));
    }

    #[test]
    fn the_defaults_that_the_help_names_are_those_of_the_service() {
        use clap::Args;
        let options = ServeOptions::default();
        let default = |ms: Duration| ms.as_millis().to_string();
        let named = [
            ("messages_mib", (options.message_bytes >> 20).to_string()),
            ("work_mib", (WORK_BYTES >> 20).to_string()),
            ("connections", options.connections.to_string()),
            ("streams", options.streams.to_string()),
            ("handshake_ms", default(options.handshake)),
            ("idle_ms", default(options.idle)),
            ("stall_ms", default(options.stall)),
            ("keepalive_ms", default(options.keepalive)),
            ("grace_ms", default(options.grace)),
        ];
        let command = ServiceLimits::augment_args(clap::Command::new("serve"));
        for (setting, value) in named {
            let help = command.get_arguments().find(|arg| arg.get_id() == setting).unwrap().get_help().unwrap();
            assert!(help.to_string().ends_with(&format!("[default: {value}]")), "{setting} is {value}: {help}");
        }
    }
}
