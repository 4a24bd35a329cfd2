//! Compiles the wire manual under `proto/` into `OUT_DIR`: messages, clients, servers, and the descriptor set that
//! reflection serves. Written without protoc, so that the build needs nothing but Rust.

use std::path::PathBuf;

use protox::prost::Message;

const PROTOS: [&str; 4] = [
    "proto/landmark/v1/types.proto",
    "proto/landmark/v1/error.proto",
    "proto/landmark/v1/memory.proto",
    "proto/landmark/v1/admin.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out_dir = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out_dir.join("landmark.bin"), descriptors.encode_to_vec())?;
    // `Bytes` shares the received buffer, so a tensor is not copied on its way in.
    tonic_prost_build::configure()
        .bytes(".landmark.v1")
        .client_mod_attribute("landmark.v1", "#[cfg(feature = \"client\")]")
        .server_mod_attribute("landmark.v1", "#[cfg(feature = \"server\")]")
        .compile_fds(descriptors)?;
    Ok(())
}
