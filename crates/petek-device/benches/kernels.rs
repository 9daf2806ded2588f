//! `cargo bench -p petek-device --bench kernels [-- layers=8 threads=1,2 formats=bf16,f32,f16 rows=1,2,4,8,14,64,512]`
//!
//! The matmuls of a 1B Llama's layers (random weights, far more than the caches hold) as shares of this machine's roofs,
//! all in one run: rows of a decode against the read rate on the very same bytes, a prefill against the registers' peak.
//! Shares are by processor time and by the wall; on a machine that is shared, the first is the kernels' own.
#![allow(clippy::print_stdout, missing_docs)]

use std::collections::HashMap;
use std::env;

use petek_device::DeviceError;
use petek_device::cpu::isa::Isa;
use petek_device::cpu::matmul::{Activations, Epilogue, Matmul};
use petek_device::cpu::pack::PackedMatrix;
use petek_device::cpu::pool::{Pool, PoolOptions};
use petek_device::cpu::roofs::{Rate, best_rate, flop_rate, read_rate};
use petek_device::ops::{Format, MatrixSpec, Parts, Tensor};

/// Outputs, inputs, gate and up, slices, of a layer's q ‖ k ‖ v, o, gate and up, down.
const LAYER: [(usize, usize, bool, usize); 4] =
    [(3072, 2048, false, 1), (2048, 2048, false, 8), (16384, 2048, true, 1), (2048, 8192, false, 8)];
const WIDEST: usize = 8192;

struct Setting {
    isa: Option<Isa>,
    layers: usize,
    threads: Vec<usize>,
    formats: Vec<Format>,
    rows: Vec<usize>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let setting = Setting::from_arguments()?;
    let report = Isa::choose(setting.isa)?;
    println!("instructions: {}, matmuls {}, differing {:?}", report.isa, report.isa_matmul, report.differing);
    for (format, threads) in
        setting.formats.iter().flat_map(|format| setting.threads.iter().map(move |t| (*format, *t)))
    {
        let mut pool = Pool::new(PoolOptions { threads, ..PoolOptions::default() })?;
        let layers = random_layers(format, setting.layers, &mut pool)?;
        let words: Vec<&[u32]> = layers.iter().map(|weights| weights.words()).collect();
        let bytes: f64 = layers.iter().map(|weights| weights.bytes() as f64).sum();
        let peak = flop_rate(&mut pool, report.isa, format)?;
        println!(
            "\n{} weights of {:.2} GB, {threads} threads; registers: {}",
            format.name(),
            bytes / 1e9,
            rate(peak, "GFLOP/s")
        );
        println!(
            "| rows | read | of the roof: busy, wall | arithmetic | of the peak: busy, wall | a row against one row |"
        );
        println!("|---|---|---|---|---|---|");
        let mut alone = None;
        for &rows in &setting.rows {
            let read = read_rate(&mut pool, report.isa, &words)?;
            let ours = pass_rate(&mut pool, report.isa_matmul, &layers, rows)?;
            let times = |x: f64| Rate { wall: ours.wall * x, busy: ours.busy * x };
            let (fetched, flops) = (times(bytes), times(2.0 * rows as f64 * bytes / format.bytes() as f64));
            let one = *alone.get_or_insert(times(rows as f64));
            println!(
                "| {rows} | {} of {} | {} | {} | {} | {:.2} x |",
                rate(fetched, "GB/s"),
                rate(read, "GB/s"),
                share(fetched, read),
                rate(flops, "GFLOP/s"),
                share(flops, peak),
                times(rows as f64).share_of(one).busy
            );
        }
    }
    Ok(())
}

/// Passes through all layers a second.
fn pass_rate(pool: &mut Pool, isa: Isa, layers: &[PackedMatrix], rows: usize) -> Result<Rate, DeviceError> {
    let format = layers[0].format();
    let numbers: Vec<f32> = (0..rows * WIDEST).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
    let mut rooms = HashMap::new();
    for (_, inputs, ..) in LAYER {
        let mut room = Activations::new(isa, format, rows, inputs)?;
        room.fill(inputs, &numbers[..rows * inputs]);
        rooms.insert(inputs, room);
    }
    let mut out = vec![0.0; rows * WIDEST];
    best_rate(pool.threads(), 4, 1.0, || {
        for weights in layers {
            let inputs = rooms[&weights.inputs()].rows(rows, weights.inputs());
            let swiglu = Epilogue::SwiGlu { bias: None };
            let epilogue = if weights.is_gate_up() { swiglu } else { Epilogue::Store { bias: None } };
            let matmul = Matmul::new(isa, weights, inputs, epilogue);
            matmul.run_in(pool, &mut out[..rows * matmul.width()])?;
        }
        Ok(())
    })
}

fn random_layers(format: Format, layers: usize, pool: &mut Pool) -> Result<Vec<PackedMatrix>, DeviceError> {
    // One matrix of bf16 numbers about 2^-7, of which all are made: what is read differs by address, not by value.
    let mut random = 1_u32;
    let bytes: Vec<u8> = (0..16384 * 2048)
        .flat_map(|_| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((random >> 16) as u16 & 0x80ff | 0x3c00).to_le_bytes()
        })
        .collect();
    let mut packed = Vec::new();
    for (outputs, inputs, gate_up, slices) in (0..layers).flat_map(|_| LAYER) {
        let part = |row0, rows| Tensor {
            name: "random weights",
            format: Format::Bf16,
            bytes: &bytes,
            stride: inputs,
            row0,
            rows,
            col0: 0,
            cols: inputs,
        };
        let whole = [part(0, outputs)];
        let halves = [part(0, outputs / 2), part(outputs / 2, outputs / 2)];
        let parts = if gate_up { Parts::GateUp(halves) } else { Parts::Stack(&whole) };
        packed.push(PackedMatrix::pack(&MatrixSpec { parts, format, slices }, pool)?);
    }
    Ok(packed)
}

fn rate(rate: Rate, unit: &str) -> String {
    format!("{:.1} ({:.1}) {unit}", rate.busy / 1e9, rate.wall / 1e9)
}

fn share(ours: Rate, roof: Rate) -> String {
    let Rate { wall, busy } = ours.share_of(roof);
    format!("**{busy:.3}**, {wall:.3}")
}

impl Setting {
    fn from_arguments() -> Result<Setting, Box<dyn std::error::Error>> {
        let mut setting = Setting {
            isa: None,
            layers: 8,
            threads: vec![1, 2],
            formats: vec![Format::Bf16, Format::F32, Format::F16],
            rows: vec![1, 2, 4, 8, 14, 64, 512],
        };
        let numbers = |list: &str| list.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>();
        for argument in env::args().skip(1).filter(|argument| argument != "--bench") {
            match argument.split_once('=') {
                Some(("isa", name)) => setting.isa = Some(name.parse()?),
                Some(("layers", number)) => setting.layers = number.parse()?,
                Some(("threads", list)) => setting.threads = numbers(list)?,
                Some(("rows", list)) => setting.rows = numbers(list)?,
                Some(("formats", list)) => {
                    let known = |name: &str| {
                        let all = [Format::F32, Format::Bf16, Format::F16];
                        all.into_iter()
                            .find(|format| format.name() == name)
                            .ok_or(format!("no format is called {name}"))
                    };
                    setting.formats = list.split(',').map(known).collect::<Result<_, _>>()?;
                }
                _ => return Err(format!("what is {argument}? See the head of benches/kernels.rs").into()),
            }
        }
        Ok(setting)
    }
}
