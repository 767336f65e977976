//! Compiles the schemas with protox, so that no system protoc is needed.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "bulkhead/hvcore.proto",
        "bulkhead/service.proto",
        "bulkhead/blkback.proto",
        "bulkhead/qemu.proto",
        "bulkhead/store.proto",
        "bulkhead/toolstack.proto",
    ];
    let set = protox::Compiler::new(["."])?
        .include_imports(true)
        .include_source_info(true)
        .open_files(files)?
        .file_descriptor_set();
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let mut encoded = Vec::new();
    prost_encode(&set, &mut encoded)?;
    std::fs::write(out.join("bulkhead.bin"), encoded)?;
    tonic_prost_build::configure().compile_fds(set)?;
    println!("cargo:rerun-if-changed=bulkhead");
    Ok(())
}

fn prost_encode(set: &impl prost::Message, out: &mut Vec<u8>) -> Result<(), Box<dyn std::error::Error>> {
    set.encode(out)?;
    Ok(())
}
