//! Random operations on a store, which holds after each of them what a plain model holds, and so does one whose catalog
//! is rebuilt from its segments at that moment.
//!
//! `LANDMARKDB_MODEL_OPERATIONS` says how many (some thousand by default), `LANDMARKDB_MODEL_SEED` where to begin. A sequence
//! that fails is cut down to the operations that matter, and printed.

use super::life::live;
use super::number_from;
use super::plan::Generator;

const OPERATIONS: usize = 3_000;
/// Operations on one disk. Many short lives meet more beginnings, some long ones more history.
const LENGTHS: [usize; 4] = [40, 100, 250, 600];

#[test]
fn a_store_holds_what_a_plain_model_holds() {
    let operations = number_from("LANDMARKDB_MODEL_OPERATIONS", OPERATIONS);
    let first = number_from("LANDMARKDB_MODEL_SEED", 1) as u64;
    let (mut done, mut removals, mut seed) = (0, 0, first);
    while done < operations {
        let mut generator = Generator::new(seed);
        let sizes = generator.sizes();
        let mut left = LENGTHS[generator.number(LENGTHS.len() as u64) as usize];
        done += left;
        let life = live(seed, sizes, true, |life| {
            left = left.checked_sub(1)?;
            Some(generator.next(&life.model))
        });
        removals += life.disk.removals();
        seed += 1;
    }
    println!(
        "{done} operations in {} lives from seed {first}, {removals} segments compacted: 0 differences",
        seed - first
    );
    assert!(removals > done / 50, "{removals} segments were compacted in {done} operations");
}
