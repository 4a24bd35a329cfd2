//! Notes the compiler, which benchmarks name.

use std::process::Command;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    let version = Command::new(std::env::var("RUSTC")?).arg("--version").output()?.stdout;
    println!("cargo::rustc-env=LANDMARKDB_RUSTC={}", String::from_utf8_lossy(&version).trim());
    Ok(())
}
