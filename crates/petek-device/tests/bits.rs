//! Matrix products give one set of bits: that of a plain scalar loop written from the numerics' definition, whatever the
//! rows beside a row, the threads, the instructions, the shape of tiles, or the ranks that share the inputs.

use petek_device::DeviceError;
use petek_device::collective::Solo;
use petek_device::cpu::isa::Isa;
use petek_device::cpu::math;
use petek_device::cpu::matmul::{Activations, Epilogue, Matmul};
use petek_device::cpu::pack::PackedMatrix;
use petek_device::cpu::pool::{Pool, PoolOptions};
use petek_device::cpu::reference::Reference;
use petek_device::cpu::simd::{Simd, SimdOptions};
use petek_device::ops::{
    Extent, Format, Heads, KvSpec, MatrixSpec, Ops, Parts, SpanRows, StepCapacity, StepInputs, Tensor,
};

const FORMATS: [Format; 3] = [Format::F32, Format::Bf16, Format::F16];
const ROWS: [usize; 13] = [1, 2, 3, 5, 7, 8, 13, 14, 15, 33, 64, 511, 512];

/// What the numbers are like.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Numbers {
    /// About one, with zeros of both signs.
    Plain,
    /// Such that products and sums border on denormal, and a tenth of the numbers are denormal.
    Tiny,
    /// Plain, with infinities and numbers whose products overflow.
    Huge,
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// `mantissa_bits` bounds the fraction, so that f32 inputs too cancel exactly now and then.
    fn number(&mut self, numbers: Numbers) -> f32 {
        let bits = self.next();
        let (fraction, kind, sign) = (bits as u32 & 0x007f_ffff, (bits >> 32) % 20, (bits >> 63) as u32);
        let exponent = match (numbers, kind) {
            (_, 0) => return f32::from_bits(sign << 31),
            (Numbers::Tiny, 1..=2) => 0,
            (Numbers::Tiny, _) => 61 + (bits >> 40) as u32 % 5,
            (Numbers::Huge, 1) if (bits >> 40).is_multiple_of(16) => {
                return f32::INFINITY.copysign(sign as f32 - 0.5);
            }
            (Numbers::Huge, 2) if (bits >> 40).is_multiple_of(16) => 254,
            (Numbers::Plain | Numbers::Huge, _) => 122 + (bits >> 40) as u32 % 8,
        };
        f32::from_bits(sign << 31 | exponent << 23 | fraction)
    }

    fn numbers(&mut self, numbers: Numbers, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number(numbers)).collect()
    }
}

// ---- the definition ---------------------------------------------------------------------------------------------

/// The inputs of one output, in a format, in slices.
fn defined_sum(format: Format, a: &[f32], w: &[f32], slices: usize) -> f32 {
    let slice = a.len() / slices;
    let sums: Vec<f32> =
        (0..slices).map(|i| chain(format, &a[i * slice..][..slice], &w[i * slice..][..slice])).collect();
    tree(&sums)
}

fn tree(sums: &[f32]) -> f32 {
    match sums {
        [sum] => *sum,
        _ => tree(&sums[..sums.len() / 2]) + tree(&sums[sums.len() / 2..]),
    }
}

fn chain(format: Format, a: &[f32], w: &[f32]) -> f32 {
    let mut sum = 0.0_f32;
    match format {
        Format::F32 => a.iter().zip(w).for_each(|(a, w)| sum = a.mul_add(*w, sum)),
        Format::F16 => {
            a.iter().zip(w).for_each(|(a, w)| sum = a.mul_add(half::f16::from_f32(*w).to_f32(), sum))
        }
        Format::Bf16 => {
            for j in 0..a.len().div_ceil(2) {
                let at = |x: &[f32], k: usize| x.get(k).map_or(0.0, |x| bf16(*x));
                sum = flushing_fma(at(a, 2 * j + 1), at(w, 2 * j + 1), sum);
                sum = flushing_fma(at(a, 2 * j), at(w, 2 * j), sum);
            }
        }
    }
    sum
}

/// Nearest even; a denormal becomes zero.
fn bf16(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0_f32.copysign(x) } else { half::bf16::from_f32(x).to_f32() }
}

/// A fused multiply-add whose result is zero if it is denormal when rounded to 24 bits: if it is less than the smallest
/// normal number by more than half a last place. In f64, where the product is exact and a sum's error is known.
fn flushing_fma(a: f32, b: f32, c: f32) -> f32 {
    let (product, c64) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c64;
    let of_c = sum - product;
    let error = (product - (sum - of_c)) + (c64 - of_c);
    let bound = f64::from(f32::MIN_POSITIVE) * (1.0 - 0.5_f64.powi(25));
    let denormal = sum.abs() < bound || (sum.abs() == bound && error * sum.signum() < 0.0);
    let rounded = a.mul_add(b, c);
    if denormal { 0.0_f32.copysign(rounded) } else { rounded }
}

/// All NaN are one: which of them comes out is nobody's promise.
fn bits(x: f32) -> u32 {
    if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() }
}

// ---- the subject ------------------------------------------------------------------------------------------------

fn isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available()).collect()
}

fn pool(threads: usize) -> Pool {
    Pool::new(PoolOptions { threads, ..PoolOptions::default() }).expect("threads")
}

fn bytes_of(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn whole(bytes: &[u8], outputs: usize, inputs: usize) -> Tensor<'_> {
    let (format, name) = (Format::F32, "weights");
    Tensor { name, format, bytes, stride: inputs, row0: 0, rows: outputs, col0: 0, cols: inputs }
}

fn pack(tensor: Tensor<'_>, format: Format, slices: usize) -> PackedMatrix {
    let spec = MatrixSpec { parts: Parts::Stack(&[tensor]), format, slices };
    PackedMatrix::pack(&spec, &mut pool(1)).expect("packed")
}

fn product(
    isa: Isa,
    pool: &mut Pool,
    weights: &PackedMatrix,
    x: &[f32],
    epilogue: Epilogue<'_>,
    out: &mut [f32],
) -> u64 {
    let inputs = weights.inputs();
    let mut room = Activations::new(isa, weights.format(), x.len() / inputs, inputs).expect("memory");
    Matmul::new(isa, weights, room.fill(inputs, x), epilogue).run_in(pool, out).expect("no lane panics")
}

/// Compares products of all shapes with the definition.
fn check(format: Format, numbers: Numbers, outputs: usize, inputs: usize, slices: usize, rows: &[usize]) {
    let seed = 0x1234_5678_9abc_def1 ^ (inputs as u64) << 32 ^ (slices as u64) << 16 ^ format as u64;
    let case = format!("{format:?} {numbers:?} {outputs} x {inputs}, {slices} slices, seed {seed:#x}");
    let mut random = Random(seed);
    const OFFSETS: [usize; 2] = [0, 5];
    let rows_max = rows.iter().max().expect("rows") + OFFSETS[1];
    let (x, w) = (random.numbers(numbers, rows_max * inputs), random.numbers(numbers, outputs * inputs));
    let expected: Vec<u32> = x
        .chunks_exact(inputs)
        .flat_map(|a| w.chunks_exact(inputs).map(move |w| bits(defined_sum(format, a, w, slices))))
        .collect();
    let bytes = bytes_of(&w);
    let weights = pack(whole(&bytes, outputs, inputs), format, slices);
    for threads in [1, 2] {
        let mut pool = pool(threads);
        for isa in isas() {
            for (rows, offset) in rows.iter().flat_map(|rows| OFFSETS.map(|offset| (*rows, offset))) {
                let mut out = vec![f32::NAN; rows * outputs];
                let x = &x[offset * inputs..(offset + rows) * inputs];
                let read = product(isa, &mut pool, &weights, x, Epilogue::Store { bias: None }, &mut out);
                assert_eq!(read, weights.bytes() as u64, "each panel is read once: {case}");
                let expected = &expected[offset * outputs..(offset + rows) * outputs];
                let differing = out.iter().zip(expected).position(|(got, want)| bits(*got) != *want);
                if let Some(at) = differing {
                    let (got, want) = (out[at], f32::from_bits(expected[at]));
                    let (row, output) = (at / outputs, at % outputs);
                    panic!(
                        "{isa}, {threads} threads, {rows} rows from {offset}, {case}: [{row}, {output}] {got:e} != {want:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn products_have_the_bits_of_the_definition() {
    for format in FORMATS {
        check(format, Numbers::Plain, 167, 101, 1, &ROWS);
        for slices in [1, 2, 4, 8] {
            check(format, Numbers::Plain, 135, 208, slices, &ROWS);
        }
    }
}

#[test]
fn products_at_the_edges_of_f32_have_the_bits_of_the_definition() {
    for (format, numbers) in
        FORMATS.into_iter().flat_map(|format| [(format, Numbers::Tiny), (format, Numbers::Huge)])
    {
        check(format, numbers, 135, 31, 1, &[1, 2, 4, 9, 14, 33]);
        check(format, numbers, 71, 48, 4, &[1, 6, 14, 16]);
    }
}

/// Ranks that hold whole slices, each its own columns, add up to the bits of one rank; ranks of one chain each do not.
#[test]
fn ranks_that_share_the_inputs_add_up_to_one_rank() {
    let (outputs, inputs, rows) = (70, 256, 9);
    for format in FORMATS {
        let mut random = Random(77);
        let (x, w) =
            (random.numbers(Numbers::Plain, rows * inputs), random.numbers(Numbers::Plain, outputs * inputs));
        let bytes = bytes_of(&w);
        let alone = |x: &[f32], tensor: Tensor<'_>, slices: usize| {
            let mut out = vec![0.0; rows * outputs];
            let weights = pack(tensor, format, slices);
            product(
                isas()[isas().len() - 1],
                &mut pool(1),
                &weights,
                x,
                Epilogue::Store { bias: None },
                &mut out,
            );
            out
        };
        let one_rank: Vec<u32> = alone(&x, whole(&bytes, outputs, inputs), 8).into_iter().map(bits).collect();
        for ranks in [2, 4, 8] {
            let width = inputs / ranks;
            let added = |slices: usize| -> Vec<u32> {
                let parts: Vec<Vec<f32>> = (0..ranks)
                    .map(|rank| {
                        let tensor =
                            Tensor { col0: rank * width, cols: width, ..whole(&bytes, outputs, inputs) };
                        let x: Vec<f32> = x
                            .chunks_exact(inputs)
                            .flat_map(|x| x[rank * width..][..width].to_vec())
                            .collect();
                        alone(&x, tensor, slices)
                    })
                    .collect();
                (0..rows * outputs)
                    .map(|i| bits(tree(&parts.iter().map(|part| part[i]).collect::<Vec<_>>())))
                    .collect()
            };
            assert_eq!(added(8 / ranks), one_rank, "{format:?}, {ranks} ranks");
            if ranks < 8 {
                assert_ne!(added(1), one_rank, "{format:?}, {ranks} ranks of one chain each");
            }
        }
    }
}

#[test]
fn epilogues_follow_the_whole_sum() {
    let (half, inputs, rows) = (77, 64, 17);
    let outputs = 2 * half;
    let mut random = Random(5);
    let (x, w) =
        (random.numbers(Numbers::Plain, rows * inputs), random.numbers(Numbers::Plain, outputs * inputs));
    let (bias, old) =
        (random.numbers(Numbers::Plain, outputs), random.numbers(Numbers::Plain, rows * outputs));
    let bytes = bytes_of(&w);
    let tensor = whole(&bytes, outputs, inputs);
    let gate_up =
        Parts::GateUp([Tensor { rows: half, ..tensor }, Tensor { row0: half, rows: half, ..tensor }]);
    for (format, slices) in FORMATS.into_iter().flat_map(|format| [(format, 1), (format, 4)]) {
        let sums: Vec<f32> = x
            .chunks_exact(inputs)
            .flat_map(|a| w.chunks_exact(inputs).map(move |w| defined_sum(format, a, w, slices)))
            .collect();
        let biased: Vec<f32> = sums.iter().zip(bias.iter().cycle()).map(|(sum, bias)| sum + bias).collect();
        let added = |sums: &[f32]| -> Vec<f32> { old.iter().zip(sums).map(|(x, sum)| x + sum).collect() };
        let activated = |sums: &[f32]| -> Vec<f32> {
            let mut out = vec![0.0; rows * half];
            for (sums, out) in sums.chunks_exact(outputs).zip(out.chunks_exact_mut(half)) {
                math::swiglu(Isa::Portable, &sums[..half], &sums[half..], out);
            }
            out
        };
        let some = Some(&bias[..]);
        for (parts, isa) in [Parts::Stack(&[tensor]), gate_up]
            .into_iter()
            .flat_map(|p| isas().into_iter().map(move |isa| (p, isa)))
        {
            let weights =
                PackedMatrix::pack(&MatrixSpec { parts, format, slices }, &mut pool(2)).expect("packed");
            let mut cases = vec![
                (Epilogue::Store { bias: None }, sums.clone()),
                (Epilogue::Store { bias: some }, biased.clone()),
                (Epilogue::Add { bias: None }, added(&sums)),
                (Epilogue::Add { bias: some }, added(&biased)),
            ];
            if weights.is_gate_up() {
                cases.push((Epilogue::SwiGlu { bias: None }, activated(&sums)));
                cases.push((Epilogue::SwiGlu { bias: some }, activated(&biased)));
            }
            for (epilogue, expected) in cases {
                let mut out = old[..expected.len()].to_vec();
                product(isa, &mut pool(2), &weights, &x, epilogue, &mut out);
                let same = out.iter().zip(&expected).all(|(got, want)| bits(*got) == bits(*want));
                assert!(
                    same,
                    "{isa} {format:?} {slices} slices, {epilogue:?}, gate and up: {}",
                    weights.is_gate_up()
                );
            }
        }
    }
}

fn simd(threads: usize, cores: Vec<usize>) -> Result<Simd, DeviceError> {
    let pool = PoolOptions { threads, threads_beside: 0, cores };
    Simd::new(SimdOptions { pool, isa: None }, Format::F32, Solo::new_group())
}

/// What a rank whose part of the vocabulary is narrower than the others' gives: zeros where the others go on, whatever
/// stood there.
#[test]
fn a_buffer_wider_than_the_product_ends_in_zeros() {
    let (rows, inputs, wide, narrow) = (3, 64, 70, 45);
    let mut random = Random(6);
    let (x, w) =
        (random.numbers(Numbers::Plain, rows * inputs), random.numbers(Numbers::Plain, wide * inputs));
    let (x_bytes, w_bytes) = (bytes_of(&x), bytes_of(&w));
    let executors: [(&str, Box<dyn Ops>); 3] = [
        ("reference", Box::new(Reference::new(Format::F32, Solo::new_group()))),
        ("simd, one thread", Box::new(simd(1, Vec::new()).expect("started"))),
        ("simd, two threads", Box::new(simd(2, Vec::new()).expect("started"))),
    ];
    for (name, mut ops) in executors {
        let mut load = |bytes: &[u8], outputs| {
            let parts = Parts::Stack(&[whole(bytes, outputs, inputs)]);
            ops.load_matrix(MatrixSpec { parts, format: Format::F32, slices: 1 }).expect("loaded")
        };
        let (table, whole, part) = (load(&x_bytes, rows), load(&w_bytes, wide), load(&w_bytes, narrow));
        let heads = Heads { query: 1, kv: 1, dim: 16 };
        let kv = KvSpec { layers: 1, heads, block_tokens: 16, blocks: 1, format: Format::F32 };
        let capacity = StepCapacity { rows, spans: 1, picks: 1, blocks_per_span: 1 };
        ops.allocate_kv(kv, capacity).expect("allocated");
        let a = ops.buffer(Extent::Rows, inputs).expect("allocated");
        let out = ops.buffer(Extent::Rows, wide).expect("allocated");
        ops.begin(&StepInputs {
            ids: &[0, 1, 2],
            positions: &[0, 1, 2],
            spans: &[SpanRows { row0: 0, rows: 3, start: 0, table0: 0 }],
            tables: &[0],
            zeroes: &[],
            copies: &[],
            picks: &[],
            draws: &[],
        })
        .expect("begun");
        ops.embed(table, 0, a);
        ops.matmul(a, whole, None, out);
        ops.matmul(a, part, None, out);
        ops.submit().expect("computed");
        for (row, (got, a)) in ops.read(out, rows).chunks_exact(wide).zip(x.chunks_exact(inputs)).enumerate()
        {
            let sums = w.chunks_exact(inputs).map(|w| defined_sum(Format::F32, a, w, 1));
            for (col, sum) in sums.enumerate() {
                let sum = if col < narrow { sum } else { 0.0 };
                // The reference sums in an order of its own: 64 roundings of terms that add up to less than 4096.
                let near = if name == "reference" { 4096.0 * 64.0 * f32::EPSILON } else { 0.0 };
                let bound = if col < narrow { near } else { 0.0 };
                assert!(
                    (got[col] - sum).abs() <= bound,
                    "{name}, row {row}, column {col}: {} {sum}",
                    got[col]
                );
            }
        }
    }
}

/// Threads are no memory: what could not be pinned is said so.
#[test]
#[cfg(target_os = "linux")]
fn threads_that_cannot_be_pinned_are_named() {
    let error = simd(2, vec![0, 1 << 20]).map(|_| ()).expect_err("no machine has this core");
    assert!(matches!(error, DeviceError::Threads(_)), "{error:?}");
    let error = error.to_string();
    assert!(error.starts_with("compute threads: pin a compute thread to core 1048576: "), "{error}");
}

/// Parts of several tensors, of several formats, at odd places in them, and rows read back.
#[test]
fn packing_takes_parts_as_they_lie() {
    let mut random = Random(9);
    let inputs = 131;
    let numbers = [Numbers::Plain, Numbers::Tiny, Numbers::Huge].map(|kind| random.numbers(kind, 50 * 140));
    let encoded: Vec<(Format, Vec<u8>)> = FORMATS
        .into_iter()
        .zip(&numbers)
        .map(|(format, numbers)| {
            // One byte in front: tensors in files stand where they stand.
            let mut bytes = vec![0xff];
            for x in numbers {
                match format {
                    Format::F32 => bytes.extend(x.to_le_bytes()),
                    Format::Bf16 => bytes.extend(half::bf16::from_f32(*x).to_le_bytes()),
                    Format::F16 => bytes.extend(half::f16::from_f32(*x).to_le_bytes()),
                }
            }
            (format, bytes)
        })
        .collect();
    let parts: Vec<Tensor<'_>> = encoded
        .iter()
        .zip([(1, 40), (7, 33), (0, 50)])
        .map(|((format, bytes), (row0, rows))| Tensor {
            name: "part",
            format: *format,
            bytes: &bytes[1..],
            stride: 140,
            row0,
            rows,
            col0: 9,
            cols: inputs,
        })
        .collect();
    let converted = |x: f32, format: Format| match format {
        Format::F32 => x,
        Format::Bf16 => bf16(x),
        Format::F16 => half::f16::from_f32(x).to_f32(),
    };
    let mut out = vec![0.0; inputs];
    for format in FORMATS {
        let stack = MatrixSpec { parts: Parts::Stack(&parts), format, slices: 1 };
        let packed = PackedMatrix::pack(&stack, &mut pool(2)).expect("packed");
        assert_eq!((packed.outputs(), packed.inputs(), packed.panels()), (123, inputs, 4));
        let rows = parts.iter().flat_map(|part| (0..part.rows).map(move |row| (part, row)));
        for (index, (part, row)) in rows.enumerate() {
            packed.row(index, &mut out);
            for (col, x) in out.iter().enumerate() {
                assert_eq!(
                    bits(*x),
                    bits(converted(part.at(row, col), format)),
                    "{format:?} row {index} column {col}"
                );
            }
        }
        let pair = [Tensor { rows: 33, ..parts[0] }, parts[1]];
        let packed =
            PackedMatrix::pack(&MatrixSpec { parts: Parts::GateUp(pair), format, slices: 1 }, &mut pool(1));
        let packed = packed.expect("packed");
        for (index, (part, row)) in
            pair.iter().flat_map(|part| (0..33).map(move |row| (part, row))).enumerate()
        {
            packed.row(index, &mut out);
            let same =
                out.iter().enumerate().all(|(col, x)| bits(*x) == bits(converted(part.at(row, col), format)));
            assert!(same, "{format:?} row {index} of gate and up");
        }
    }
}

#[test]
fn matrices_that_do_not_fit_together_are_refused() {
    let bytes = vec![0; 64 * 64 * 4];
    let good = whole(&bytes, 64, 64);
    let outside = Tensor { rows: 65, ..good };
    let narrow = Tensor { cols: 63, ..good };
    let cases: [(Parts<'_>, usize); 9] = [
        (Parts::Stack(&[]), 1),
        (Parts::Stack(&[outside]), 1),
        (Parts::Stack(&[good, narrow]), 1),
        (Parts::Stack(&[Tensor { rows: 0, ..good }]), 1),
        (Parts::GateUp([good, Tensor { rows: 63, ..good }]), 1),
        (Parts::Stack(&[good]), 3),
        (Parts::Stack(&[good]), 16),
        (Parts::Stack(&[narrow]), 2),
        (Parts::Stack(&[Tensor { cols: 12, ..good }]), 4),
    ];
    for (parts, slices) in cases {
        let refused = PackedMatrix::pack(&MatrixSpec { parts, format: Format::Bf16, slices }, &mut pool(1));
        let error = refused.map(|_| ()).expect_err("a shape that does not fit").to_string();
        assert!(error.contains("expected"), "{error}");
    }
}
