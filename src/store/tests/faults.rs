//! The system fails at every call of a script, once or until it is well again: nothing acknowledged is lost, nothing
//! wrong is read, and the store goes on without a restart unless it cannot know where its log ends.
//!
//! With `--nocapture`, the outcomes are printed: a row for each step of the script, a column for each fault.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::crash::{SCRIPT, expected};
use super::*;
use crate::store::fault_disk::{Call, Effect, Fault, Files, Reason, Table};

/// What became of the store, from the best to the worst that is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// Every call succeeded in spite of the fault.
    Unnoticed,
    /// The call under way failed; repeated once the system was well it succeeded, and so did all that followed.
    WentOn,
    /// Writes were refused until the store was opened again: a write or sync of a segment had failed.
    Reopened,
    /// It could not be opened while the fault lasted, and could afterwards.
    OpenedLater,
}

const REASONS: [(Reason, &str); 3] = [(Reason::Full, "ENOSPC"), (Reason::Broken, "EIO"), (Reason::OpenFiles, "EMFILE")];

/// The calls of the script on a disk that is well, with the number of calls before each step and after the last.
fn calls() -> (Vec<Call>, Vec<usize>) {
    let disk = FaultDisk::default();
    disk.trace();
    let store = open(&disk).unwrap();
    let mut begins = Vec::new();
    for step in SCRIPT {
        begins.push(disk.call_count());
        step(&store).unwrap();
    }
    begins.push(disk.call_count());
    drop(store);
    (disk.calls(), begins)
}

/// What a failing call may have done by then.
fn effects(reason: Reason, call: Call) -> &'static [Effect] {
    match (reason, call) {
        (Reason::Full, Call::Write | Call::Apply) => &[Effect::Nothing, Effect::Half],
        (Reason::Full, _) => &[Effect::Nothing],
        (_, Call::Write | Call::Sync | Call::Apply) => &[Effect::Nothing, Effect::Half, Effect::Everything],
        (_, Call::Create | Call::Remove | Call::Truncate | Call::Flush | Call::Discard) => {
            &[Effect::Nothing, Effect::Everything]
        }
        _ => &[Effect::Nothing],
    }
}

/// A run of the script against one fault.
struct Run<'a> {
    disk: FaultDisk,
    fault: Fault,
    outcome: Outcome,
    expected: &'a [Contents],
}

impl Run<'_> {
    /// Runs all of it. An error says what was lost or wrong.
    fn strike(mut self) -> Result<Outcome, String> {
        self.disk.fail(self.fault);
        let mut store = match open(&self.disk) {
            Ok(store) => store,
            Err(error) => {
                is_fault(&error)?;
                self.disk.heal();
                self.outcome = Outcome::OpenedLater;
                open(&self.disk).map_err(|error| format!("once the system is well: {error}"))?
            }
        };
        let mut step = 0;
        while step < SCRIPT.len() {
            match SCRIPT[step](&store) {
                Ok(()) => step += 1,
                Err(error) => {
                    let failed = self.after(store, step, error);
                    (store, step) = failed.map_err(|problem| format!("step {step}: {problem}"))?;
                }
            }
        }
        self.disk.heal();
        self.finish(store).map(|()| self.outcome)
    }

    /// A step failed: the system gets well, and the step is done in the end. Returns the step that comes next.
    fn after(&mut self, store: Store, step: usize, error: StoreError) -> Result<(Store, usize), String> {
        is_fault(&error)?;
        if self.outcome != Outcome::Unnoticed {
            return Err(format!("the fault is felt again: {error}"));
        }
        let allowed = [&self.expected[step], &self.expected[step + 1]];
        if let Ok(found) = try_contents(&store)
            && !allowed.contains(&&found)
        {
            return Err(format!("while the fault lasts, wrong contents are read after {error}"));
        }
        let struck = self.disk.heal();
        self.outcome = Outcome::WentOn;
        let next = self.resume(&store, step)?;
        let Some(again) = SCRIPT.get(next) else { return Ok((store, next)) };
        let Err(refused) = again(&store) else { return Ok((store, next + 1)) };
        if !struck.iter().any(|call| matches!(call, Call::Write | Call::Sync | Call::Truncate)) {
            return Err(format!("{struck:?} failed ({error}), and once the system is well: {refused}"));
        }
        self.outcome = Outcome::Reopened;
        drop(store);
        let store = open(&self.disk).map_err(|error| format!("opened again: {error}"))?;
        let next = self.resume(&store, step)?;
        // What counts now has to outlast the power, whatever the failed sync left where.
        for table in [Table::Flushed, Table::Deleted] {
            let copy = open(&self.disk.restart(Files::Synced, table)).map_err(|error| error.to_string())?;
            if try_contents(&copy).ok().as_ref() != Some(&self.expected[next]) {
                return Err(format!("after {error}, opening again and a power cut, what was read before is gone"));
            }
        }
        Ok((store, next))
    }

    /// The step to go on with: this one again, or the next if it was done in spite of its error.
    fn resume(&self, store: &Store, step: usize) -> Result<usize, String> {
        let found = try_contents(store).map_err(|error| format!("reading once the system is well: {error}"))?;
        let next = [step + 1, step].into_iter().find(|&at| found == self.expected[at]);
        next.ok_or_else(|| "the store holds neither what it held before the step nor after it".into())
    }

    /// The script is done: everything is there, in this process and after any end of it.
    fn finish(&self, store: Store) -> Result<(), String> {
        let all = &self.expected[SCRIPT.len()];
        let is_right = |store: &Store, when: &str| {
            let found = try_contents(store).map_err(|error| format!("{when}: {error}"))?;
            let faults = store.verify(None, &mut |_, _| {}).map_err(|error| format!("{when}: {error}"))?.faults;
            if found != *all || !faults.is_empty() {
                return Err(format!("{when}: wrong contents, or {faults:?}"));
            }
            Ok(())
        };
        is_right(&store, "at the end")?;
        for (files, table) in ENDS {
            let when = format!("after {files:?} and {table:?}");
            let again = open(&self.disk.restart(files, table)).map_err(|error| format!("{when}: {error}"))?;
            is_right(&again, &when)?;
        }
        Ok(())
    }
}

const ENDS: [(Files, Table); 4] = [
    (Files::Written, Table::Applied),
    (Files::Written, Table::Flushed),
    (Files::Synced, Table::Flushed),
    (Files::Synced, Table::Deleted),
];

fn is_fault(error: &StoreError) -> Result<(), String> {
    let names_it = matches!(error, StoreError::Io { .. } | StoreError::Catalog { .. } | StoreError::Poisoned);
    if names_it { Ok(()) } else { Err(format!("a fault of the system is reported as {error:?}")) }
}

/// All faults at one call of the script.
fn faults_at(at: usize, call: Call) -> impl Iterator<Item = (usize, Fault)> {
    REASONS.iter().enumerate().filter(move |(_, (reason, _))| reason.strikes(call)).flat_map(
        move |(row, &(reason, _))| {
            let kinds = effects(reason, call).iter().flat_map(|&effect| [(effect, false), (effect, true)]);
            kinds
                .map(move |(effect, stays)| (2 * row + stays as usize, Fault { at, reason, only: None, effect, stays }))
        },
    )
}

fn print(table: &BTreeMap<(usize, usize, Outcome), usize>) {
    let heads: Vec<String> =
        REASONS.iter().flat_map(|(_, name)| [format!("{name} once"), format!("{name} for long")]).collect();
    let mut text = format!("{:<8}", "step");
    heads.iter().for_each(|head| write!(text, "{head:>18}").unwrap());
    for step in 0..SCRIPT.len() + 2 {
        write!(text, "\n{:<8}", step_name(step)).unwrap();
        for column in 0..heads.len() {
            let count = |outcome| table.get(&(step, column, outcome)).copied().unwrap_or(0);
            use Outcome::*;
            let cell = [Unnoticed, WentOn, Reopened, OpenedLater].map(|outcome| count(outcome).to_string()).join("/");
            write!(text, "{cell:>18}").unwrap();
        }
    }
    println!("{text}\nunnoticed/went on/reopened/opened later; 0 lost, 0 wrong");
}

/// Step 0 is opening, the last one closing.
fn step_name(step: usize) -> String {
    match step {
        0 => "open".into(),
        step if step > SCRIPT.len() => "close".into(),
        step => format!("step {}", step - 1),
    }
}

#[test]
fn faults_at_every_call_lose_nothing_and_pass() {
    let expected = expected();
    let (calls, begins) = calls();
    let (mut table, mut wrong) = (BTreeMap::new(), BTreeMap::<_, Vec<String>>::new());
    for (at, &call) in calls.iter().enumerate() {
        let step = begins.partition_point(|&begin| begin <= at);
        for (column, fault) in faults_at(at, call) {
            let run = Run { disk: FaultDisk::default(), fault, outcome: Outcome::Unnoticed, expected: &expected };
            match run.strike() {
                Ok(outcome) => *table.entry((step, column, outcome)).or_default() += 1,
                Err(problem) => {
                    let kind = format!("{call:?}, {:?}", fault.reason);
                    wrong.entry(kind).or_default().push(format!("{}, {fault:?}: {problem}", step_name(step)));
                }
            }
        }
    }
    print(&table);
    let right: usize = table.values().sum();
    let count = right + wrong.values().map(Vec::len).sum::<usize>();
    assert!(count > 1_000, "the script meets {count} faults");
    let kinds = wrong.iter().map(|(kind, of)| format!("{kind}: {} faults, the first at {}\n", of.len(), of[0]));
    assert!(wrong.is_empty(), "{} of {count} faults:\n{}", count - right, kinds.collect::<String>());
}
