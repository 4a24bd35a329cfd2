//! [`simd!`] and the building blocks of the functions it compiles.

/// The instruction sets that [`simd!`](crate::simd!) compiles for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// AVX-512 F, BW, VL and DQ, with F16C.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// What the target always has.
    Portable,
}

/// The widest level of this machine, detected once.
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

/// Compiles a function for every [`Level`](crate::Level) and calls the one of this machine. The body sees a constant `FMA`:
/// `fma::<FMA>(a, b, c)` is fused where the level has the instruction.
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

/// `a * b + c`, fused if `FMA`.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction `mul_add` is a slow library call.
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Accumulators of a reduction: two AVX-512 registers, to hide the latency of an addition.
pub const LANES: usize = 32;

/// Reduces lanes pairwise, in log2(N) dependent steps. `N` is a power of two.
#[inline(always)]
pub fn fold<const N: usize>(mut lanes: [f32; N], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = N / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The larger of two values; `a` if `b` is NaN.
#[inline(always)]
pub fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}
