//! Power cuts, deaths and failed syncs at random moments of random work: what was acknowledged is there afterwards, and what
//! was under way is there as a whole or not at all.
//!
//! `LANDMARKDB_POWER_CUTS` says how many (some hundred by default), `LANDMARKDB_MODEL_SEED` where to begin.

use super::life::live;
use super::number_from;
use super::plan::Generator;

const CUTS: usize = 800;
/// Operations on one disk: some twenty deaths.
const LENGTH: usize = 300;

#[test]
fn nothing_acknowledged_is_lost_when_the_power_is_cut() {
    let cuts = number_from("LANDMARKDB_POWER_CUTS", CUTS);
    let first = number_from("LANDMARKDB_MODEL_SEED", 1) as u64;
    let (mut done, mut operations, mut removals, mut seed) = (0, 0, 0, first);
    while done < cuts {
        let mut generator = Generator::new(seed);
        let sizes = generator.sizes();
        let mut left = LENGTH;
        let life = live(seed, sizes, false, |life| {
            left = left.checked_sub(1)?;
            operations += 1;
            Some(if generator.number(8) == 0 { generator.bad() } else { generator.next(&life.model) })
        });
        done += life.deaths;
        removals += life.disk.removals();
        seed += 1;
    }
    println!(
        "{done} cuts in {operations} operations from seed {first}, {removals} segments compacted: 0 acknowledged blocks \
         lost, 0 wrong"
    );
    assert!(removals > operations / 50, "{removals} segments were compacted in {operations} operations");
}
