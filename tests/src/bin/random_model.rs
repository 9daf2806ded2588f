//! Writes a folder of random weights in the shape of Llama-3.2-1B, for measuring speed at a real size.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use petek_tests::llama::LlamaShape;
use petek_tests::random_model::RandomModel;
use safetensors::tensor::Dtype;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("random_model: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ["1b", dtype, dir] = args[..] else {
        bail!("usage: random_model 1b bf16|f16|f32 DIR");
    };
    let dtype = match dtype {
        "bf16" => Dtype::BF16,
        "f16" => Dtype::F16,
        "f32" => Dtype::F32,
        other => bail!("{other} is no dtype of weights; bf16, f16 and f32 are"),
    };
    RandomModel { shape: LlamaShape::llama_1b(), dtype, seed: 1 }.write(Path::new(dir))
}
