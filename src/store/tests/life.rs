//! A store that lives through a sequence of operations, beside the model of what it holds; and what is left of a sequence
//! that goes wrong.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::plan::{Answer, Bad, Model, Op, Sizes};
use super::*;
use crate::store::fault_disk::{Call, Effect, Fault, Files, Reason, Table};

pub(super) fn open_with(disk: &FaultDisk, sizes: Sizes) -> Result<Store, StoreError> {
    let sizes = super::Sizes { segment_bytes: sizes.segment_bytes, group_bytes: 600 };
    disk.reopen();
    Store::open_sized(Box::new(disk.clone()), Arc::new(disk.clone()), sizes)
}

/// All that a store should hold, and that nothing in it is wrong.
pub(super) fn check(store: &Store, model: &Model) -> Result<(), String> {
    model.compare(store)?;
    let faults = faults(store).map_err(|error| error.to_string())?;
    if let Some(fault) = faults.first() {
        return Err(format!("verify: {} faults, the first {fault:?}", faults.len()));
    }
    Ok(())
}

/// As [`check`], of a store that knows nothing but the disk's segments.
pub(super) fn check_rebuilt(disk: &FaultDisk, sizes: Sizes, model: &Model) -> Result<(), String> {
    let copy = disk.restart(Files::Synced, Table::Deleted);
    let store = open_with(&copy, sizes).map_err(|error| format!("without the catalog: {error}"))?;
    check(&store, model).map_err(|difference| format!("without the catalog: {difference}"))
}

/// A store at work, and what it should hold.
pub(super) struct Life {
    pub(super) disk: FaultDisk,
    store: Option<Store>,
    pub(super) model: Model,
    sizes: Sizes,
    /// What the disk is about to do to it.
    armed: Option<Bad>,
    /// How often it came up again after a death.
    pub(super) deaths: usize,
    /// Compares everything after every operation, and not only after a death.
    always: bool,
}

impl Life {
    pub(super) fn begin(sizes: Sizes, always: bool) -> Life {
        Life { disk: FaultDisk::default(), store: None, model: Model::default(), sizes, armed: None, deaths: 0, always }
    }

    fn open(&mut self) -> Result<&Store, StoreError> {
        match &mut self.store {
            Some(store) => Ok(store),
            none => Ok(none.insert(open_with(&self.disk, self.sizes)?)),
        }
    }

    pub(super) fn step(&mut self, op: Op) -> Result<(), String> {
        match op {
            Op::Restart(files, table) => {
                self.armed = None;
                self.disk = self.disk.restart(files, table);
                self.store = None;
            }
            Op::Expect(bad) => self.arm(bad),
            _ => {}
        }
        let before = self.model.clone();
        let result = self.open().and_then(|store| before.run(store, op));
        let expected = self.model.step(op);
        let answer = Answer::of(&result);
        if let Some(bad) = self.armed
            && self.disk.has_failed()
            && (answer == Answer::Fault || answer == expected)
        {
            // What was answered as done has to be there.
            let before = if answer == Answer::Fault { before } else { self.model.clone() };
            return self.rise(bad, before).map_err(|problem| format!("after {bad:?} ({result:?}): {problem}"));
        }
        if answer != expected {
            return Err(format!("answered {result:?}, expected {expected:?}"));
        }
        let Some(store) = &self.store else { return Err("no store".into()) };
        self.model.adopt(store)?;
        if self.always {
            check(store, &self.model)?;
            check_rebuilt(&self.disk, self.sizes, &self.model)?;
        }
        Ok(())
    }

    fn arm(&mut self, bad: Bad) {
        if self.armed.is_some() {
            return;
        }
        self.armed = Some(bad);
        match bad {
            Bad::Death { after, effect, .. } => self.disk.die_at(self.disk.operations() + after as usize, effect),
            Bad::Sync { after, effect, .. } => self.disk.fail(Fault {
                at: self.disk.call_count() + after as usize,
                reason: Reason::Broken,
                only: Some(Call::Sync),
                effect,
                stays: false,
            }),
        }
    }

    /// The machine, or the process, comes up again: the operation under way counts as a whole or not at all.
    fn rise(&mut self, bad: Bad, before: Model) -> Result<(), String> {
        self.armed = None;
        self.store = None;
        self.deaths += 1;
        self.disk = match bad {
            Bad::Sync { table, .. } => self.disk.restart(Files::Written, table),
            Bad::Death { files, table, .. } => self.disk.restart(files, table),
        };
        if let Bad::Death { again: Some(again), files, .. } = bad {
            self.disk.die_at(again as usize, Effect::Half);
            if open_with(&self.disk, self.sizes).is_err() || self.disk.has_failed() {
                self.deaths += 1;
            }
            self.disk = self.disk.restart(files, Table::Flushed);
        }
        let after = std::mem::replace(&mut self.model, before);
        let store = open_with(&self.disk, self.sizes).map_err(|error| format!("open: {error}"))?;
        if let Err(not_before) = check(&store, &self.model) {
            self.model = after;
            let risen = self.model.adopt(&store).and_then(|()| check(&store, &self.model));
            risen.map_err(|not_after| format!("neither before ({not_before}) nor after ({not_after})"))?;
        }
        self.store = Some(store);
        check_rebuilt(&self.disk, self.sizes, &self.model)
    }
}

/// Runs a sequence until it goes wrong: at which operation, and how.
fn play(ops: &[Op], sizes: Sizes, always: bool) -> Result<(), (usize, String)> {
    let mut life = Life::begin(sizes, always);
    for (number, &op) in ops.iter().enumerate() {
        step_caught(&mut life, op).map_err(|problem| (number, problem))?;
    }
    Ok(())
}

fn step_caught(life: &mut Life, op: Op) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(|| life.step(op))).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().cloned();
        Err(format!("panicked: {}", said.or(panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or_default()))
    })
}

/// Leaves out whatever the failure does not need, in ever smaller pieces.
pub(super) fn shrink(mut ops: Vec<Op>, fails: impl Fn(&[Op]) -> bool) -> Vec<Op> {
    let mut piece = ops.len().div_ceil(2);
    loop {
        let before = ops.len();
        let mut from = 0;
        while from < ops.len() {
            let without: Vec<Op> = ops
                .iter()
                .enumerate()
                .filter(|(at, _)| !(from..from + piece).contains(at))
                .map(|(_, &op)| op)
                .collect();
            if !without.is_empty() && fails(&without) {
                ops = without;
            } else {
                from += piece;
            }
        }
        if piece == 1 && ops.len() == before {
            return ops;
        }
        piece = piece.div_ceil(2).max(1);
    }
}

/// Lives as long as `next` has operations for it. Prints what it takes to see a failure again.
pub(super) fn live(seed: u64, sizes: Sizes, always: bool, mut next: impl FnMut(&Life) -> Option<Op>) -> Life {
    let (mut life, mut ops) = (Life::begin(sizes, always), Vec::new());
    while let Some(op) = next(&life) {
        ops.push(op);
        if let Err(problem) = step_caught(&mut life, op) {
            let ops = shrink(ops, |ops| play(ops, sizes, always).is_err());
            let shrunk = play(&ops, sizes, always).err();
            let list: Vec<String> = ops.iter().map(|op| format!("    {op:?}")).collect();
            panic!(
                "seed {seed}, {sizes:?}: {problem}\nshrunk to {} operations, which end in {shrunk:?}:\n{}",
                ops.len(),
                list.join("\n")
            );
        }
    }
    life
}

#[test]
fn shrinking_leaves_the_operations_that_matter() {
    let mut generator = super::plan::Generator::new(3);
    let mut ops: Vec<Op> = (0..200).map(|_| generator.next(&Model::default())).collect();
    ops.extend([Op::CreateCollection(0), Op::CreateCollection(1)]);
    let matters = |ops: &[Op]| {
        let create = ops.iter().position(|op| matches!(op, Op::CreateCollection(0)));
        create.is_some_and(|at| ops[at..].iter().any(|op| matches!(op, Op::CreateCollection(1))))
    };
    let shrunk = shrink(ops, matters);
    assert!(matches!(shrunk[..], [Op::CreateCollection(0), Op::CreateCollection(1)]), "{shrunk:?}");
}
