//! Functions compiled for several instruction sets, and what their bodies are made of.

/// The widest instruction set that `simd!` functions use here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Avx512,
    Avx2,
    Portable,
}

/// What this machine has; found once.
#[inline]
pub fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") && has!("f16c") {
            return Level::Avx512;
        }
        if has!("avx2") && has!("fma") && has!("f16c") {
            return Level::Avx2;
        }
    }
    Level::Portable
}

/// Compiles a function for several instruction sets. Inside the body, `fma::<FMA>(a, b, c)` is `a * b + c`, fused
/// where the machine can.
#[macro_export]
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident$(<$generic:ident: $bound:ident>)?($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[inline]
        $vis fn $name$(<$generic: $bound>)?($($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            fn body<$($generic: $bound,)? const FMA: bool>($($arg: $type),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
                fn avx512$(<$generic: $bound>)?($($arg: $type),*) $(-> $ret)? {
                    body::<$($generic,)? true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2$(<$generic: $bound>)?($($arg: $type),*) $(-> $ret)? {
                    body::<$($generic,)? true>($($arg),*)
                }
                match $crate::level() {
                    // SAFETY: `level` found these instruction sets on this machine.
                    $crate::Level::Avx512 => return unsafe { avx512$(::<$generic>)?($($arg),*) },
                    // SAFETY: as above.
                    $crate::Level::Avx2 => return unsafe { avx2$(::<$generic>)?($($arg),*) },
                    $crate::Level::Portable => {}
                }
            }
            body::<$($generic,)? false>($($arg),*)
        }
    };
}

/// `a * b + c`.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction `mul_add` is a slow library call.
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Accumulators that a reduction keeps apart: two AVX-512 registers' worth, to hide the latency of an addition.
pub const LANES: usize = 32;

/// Joins accumulators at shrinking distance: for 16 of them four dependent steps, in registers, and not sixteen.
#[inline(always)]
pub fn fold<const N: usize>(mut lanes: [f32; N], two: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = N / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = two(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The larger one; the first if the second is no number.
#[inline(always)]
pub fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}
